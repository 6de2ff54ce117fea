"""Every example runs, and the notebook shows what its code gives."""

from __future__ import annotations

import base64
import io
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from tests.notebooks import NOTEBOOK, ROOT, code_cells, run_in_process

EXAMPLES = ROOT / "examples"
MADE_BEFORE = ROOT / "tests" / "made_before"
COMMANDS = {
    "answer_a_chat.py": ["--steps", "2"],
    "several_seeds.py": ["--steps", "2", "--seeds", "1", "2"],
    "own_chats.py": [str(MADE_BEFORE / "chats"), "--steps", "2"],
    "read_samples.py": [str(MADE_BEFORE / "data"), "--split", "test"],
}


@pytest.fixture
def run_example(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Run an example in an empty directory, and return what it prints."""

    def run(name: str, *extra: str) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [name, *COMMANDS[name], *extra])
        try:
            runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        finally:
            printed = capsys.readouterr().out
        return printed

    return run


def test_every_example_is_run_and_listed() -> None:
    listed = set(re.findall(r"[a-z_]+\.(?:py|ipynb)", (EXAMPLES / "README.md").read_text()))
    assert listed == {path.name for path in EXAMPLES.iterdir()} - {"README.md", "__pycache__"}
    assert listed == {*COMMANDS, NOTEBOOK.name}


@pytest.mark.parametrize(
    ("name", "extra", "shown", "images"),
    [
        ("answer_a_chat.py", [], "21 tokens: # look what i saw", {"answer.png": (64, 64)}),
        ("several_seeds.py", [], "step 2 of 2", {"answers.png": (128, 64)}),
        ("own_chats.py", [], "# look at the green tent", {"answers/test-test1-1-0.png": (64, 64)}),
        ("read_samples.py", [], "2 (2, 8, 16, 16) (2, 77, 64) Turn(", {}),
        ("read_samples.py", ["--webdataset"], "2 (2, 8, 16, 16) (2, 77, 64) Turn(", {}),
    ],
)
def test_example_runs(
    run_example: Callable[..., str],
    name: str,
    extra: list[str],
    shown: str,
    images: dict[str, tuple[int, int]],
    tmp_path: Path,
) -> None:
    assert shown in run_example(name, *extra)
    for path, size in images.items():
        with Image.open(tmp_path / path) as image:
            assert image.size == size


def test_example_stops_when_time_is_up(run_example: Callable[..., str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="out of time"):
        run_example("several_seeds.py", "--seconds", "0")
    assert not list(tmp_path.iterdir())


def test_notebook_shows_what_its_code_gives() -> None:
    assert NOTEBOOK.stat().st_size < 300_000
    found, num_images = run_in_process(NOTEBOOK), 0
    for cell, outputs in zip(code_cells(NOTEBOOK), found, strict=True):
        assert len(cell["outputs"]) == len(outputs)
        for stored, output in zip(cell["outputs"], outputs, strict=True):
            shown = output.get("data", {}).pop("image/png", None)
            image = stored.get("data", {}).pop("image/png", None)
            # Written by `python -m tests.notebooks`; last digits of pixels depend on the machine.
            assert output == stored
            assert (shown is None) == (image is None)
            if image:
                num_images += 1
                assert Image.open(io.BytesIO(base64.b64decode(image))).width >= 192
    assert num_images == 4
