"""The names of `d2i` itself: light to import, typed, and as docs/python.md uses them."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import d2i

ROOT = Path(__file__).resolve().parents[2]
HEAVY = {"torch", "ray", "deepspeed", "diffusers", "transformers", "torchvision", "webdataset"}


def modules_after(program: str) -> set[str]:
    printed = f"import sys\n{program}\nprint(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", printed], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_import_of_d2i_imports_no_other_part_of_it() -> None:
    found = modules_after("import d2i")
    assert [name for name in found if name.startswith("d2i.")] == []
    assert not found & (HEAVY | {"numpy", "PIL"})


def test_dataset_needs_no_torch() -> None:
    program = "import d2i; d2i.webdataset; d2i.Dataset('tests/made_before/data', 'test')[0]"
    assert not modules_after(program) & HEAVY


def test_every_public_name_is_there_and_in_the_stub() -> None:
    stub = ast.parse((ROOT / "d2i" / "__init__.pyi").read_text())
    imported = {
        str(alias.asname): f"{node.module}"
        for node in stub.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert imported == vars(d2i)["_PLACES"]
    assert sorted(imported) == d2i.__all__
    assert set(d2i.__all__) <= set(dir(d2i))
    for name in d2i.__all__:
        assert getattr(d2i, name).__module__ == imported[name]
    with pytest.raises(AttributeError, match="module 'd2i' has no attribute 'absent'"):
        _ = d2i.absent  # type: ignore[attr-defined]


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def test_page_runs_from_top_to_bottom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(ROOT / "tests" / "made_before" / "data")
    exec("\n".join(blocks("docs/python.md")), {})
    assert (tmp_path / "answer.png").is_file()
    assert "test-test1-1-0" in capsys.readouterr().out


def test_line_of_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d2i-demo").mkdir()
    (tmp_path / "d2i-demo" / "run").symlink_to(ROOT / "tests" / "made_before" / "run")
    (line,) = blocks("README.md")
    exec(line, {"d2i": d2i})
    assert (tmp_path / "answer.png").is_file()
