"""Run the code of a notebook, without Jupyter; `python -m tests.notebooks` stores what it shows.

Each cell runs in order in one process. Its output is what it prints and its last value, an image as
PNG, in the form of nbformat 4.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "examples" / "own_chats.ipynb"


def run_in_process(path: Path) -> list[list[dict[str, Any]]]:
    """Run a notebook in a process of its own, and return the outputs of each code cell."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.notebooks", str(path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    outputs: list[list[dict[str, Any]]] = json.loads(done.stdout.splitlines()[-1])
    return outputs


def code_cells(path: Path) -> list[dict[str, Any]]:
    """Return the code cells of a notebook."""
    notebook = json.loads(path.read_text())
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def run_cells(path: Path) -> list[list[dict[str, Any]]]:
    """Run the code cells in this process, and return their outputs."""
    names: dict[str, Any] = {"__name__": "__main__"}
    return [
        run_cell("".join(cell["source"]), names, number)
        for number, cell in enumerate(code_cells(path), start=1)
    ]


def run_cell(source: str, names: dict[str, Any], number: int) -> list[dict[str, Any]]:
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    printed, value = io.StringIO(), None
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, f"<cell {number}>", "exec"), names)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), f"<cell {number}>", "eval"), names)
    outputs: list[dict[str, Any]] = []
    if text := printed.getvalue():
        lines = text.splitlines(keepends=True)
        outputs.append({"name": "stdout", "output_type": "stream", "text": lines})
    if value is not None:
        shown = {"data": data_of(value), "metadata": {}}
        outputs.append(shown | {"execution_count": number, "output_type": "execute_result"})
    return outputs


def data_of(value: Any) -> dict[str, Any]:
    if hasattr(value, "_repr_png_"):
        return {
            "image/png": base64.b64encode(value._repr_png_()).decode() + "\n",
            "text/plain": [f"<image of {value.width} x {value.height} pixels>"],
        }
    return {"text/plain": repr(value).splitlines(keepends=True)}


def main() -> None:
    """Print the outputs of the notebook that is named, or store those of the example."""
    if len(sys.argv) > 1:
        print(json.dumps(run_cells(Path(sys.argv[1]))))
        return
    notebook = json.loads(NOTEBOOK.read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for number, (cell, outputs) in enumerate(zip(cells, run_cells(NOTEBOOK), strict=True), start=1):
        cell |= {"execution_count": number, "outputs": outputs}
    NOTEBOOK.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
