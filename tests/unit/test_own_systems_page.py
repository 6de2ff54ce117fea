"""The example of docs/own-systems.md is a system: built by name, reproducible, with its reasons."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from d2i.dialog import Turn
from d2i.encoders import Encoders
from d2i.eval.prompts import Prompt
from d2i.eval.system import Generation, System, SystemContext
from d2i.eval.systems import build_system, parse_system
from d2i.recipes import load_recipe

PAGE = Path(__file__).resolve().parents[2] / "docs" / "own-systems.md"
PROMPTS = [
    Prompt("test-1-0", (Turn(0, "hello"),), "# hello"),
    Prompt("test-2-0", (Turn(0, "hi"),), "# hi"),
    Prompt("test-3-0", (), ""),
]


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> System:
    (example,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (tmp_path / "my_system.py").write_text(example)
    monkeypatch.syspath_prepend(tmp_path)
    recipe = load_recipe("demo")
    spec = parse_system("my_system:build", None, recipe)
    # The example uses no encoder.
    encoders = object.__new__(Encoders)
    return build_system(SystemContext(spec, recipe, encoders, (), "cpu"))


def test_example_generates_one_image_per_prompt_or_a_reason(system: System) -> None:
    generations = system.generate(PROMPTS)
    assert [generation.reason for generation in generations] == ["", "", "empty_context"]
    assert system.described["system"] == "noise"


def content(generation: Generation) -> tuple[bytes, str]:
    pixels = generation.pixels
    return b"" if pixels is None else pixels.tobytes(), generation.reason


def test_example_images_do_not_depend_on_other_prompts(system: System) -> None:
    together = [content(generation) for generation in system.generate(PROMPTS)]
    assert [content(system.generate([prompt])[0]) for prompt in PROMPTS] == together
    assert together[0] != together[1]
