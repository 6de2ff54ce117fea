"""The commands, settings, make targets and links in the documents exist."""

from __future__ import annotations

import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest
from typer.main import get_command

from d2i.cli.app import app
from d2i.config import apply_settings
from d2i.recipes import load_recipe, resolve_recipe
from d2i.run_dir import check_initial_weights
from tests.command_lines import every_command, examples_in, help_page, parse_d2i

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("[a-z]*/README.md"), *(ROOT / "docs").glob("*.md")]

OTHERS = {"export", "kubectl"}


def shell_lines() -> list[str]:
    lines = []
    for document in DOCUMENTS:
        for block in re.findall(r"```sh\n(.*?)```", document.read_text(), re.DOTALL):
            joined = block.replace("\\\n", " ")
            lines += [line.split("  #")[0].strip() for line in joined.splitlines() if line.strip()]
    return lines


def examples() -> list[str]:
    """Return the example commands in every --help, as printed on a terminal of 80 columns."""
    commands = every_command(get_command(app))
    return [line for command in commands for line in examples_in(help_page(command))]


@pytest.mark.parametrize(
    "line",
    # d2i is also the name of a Kubernetes namespace.
    [line for line in shell_lines() if "d2i " in line and line.split()[0] not in OTHERS],
)
def test_command_in_documents_parses(line: str) -> None:
    if " -m d2i." not in line and "import d2i" not in line:
        parse_d2i(line)


@pytest.mark.parametrize("line", examples())
def test_example_in_help_parses(line: str) -> None:
    assert "d2i " in line
    parse_d2i(line)


@pytest.mark.parametrize(
    "line",
    [
        line
        for line in shell_lines() + examples()
        if line.startswith("d2i train ") and "--preflight" not in line
    ],
)
def test_documented_training_has_initial_weights(line: str, tmp_path: Path) -> None:
    words = shlex.split(line)
    settings = [word for flag, word in pairwise(words) if flag == "--set"]
    recipe = resolve_recipe(words[words.index("--recipe") + 1], settings)
    check_initial_weights(recipe, str(tmp_path))


def test_every_command_has_examples() -> None:
    leaves = [c for c in every_command(get_command(app)) if not getattr(c, "commands", None)]
    assert len(leaves) >= 12
    for leaf in leaves:
        assert "Examples:" in (leaf.help or ""), leaf.name


@pytest.mark.parametrize("line", [line for line in shell_lines() if line.startswith("make ")])
def test_documented_make_target_exists(line: str) -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    asked = {word for word in shlex.split(line)[1:] if "=" not in word}
    assert asked <= targets


def test_corpora_page_lists_settings_with_defaults() -> None:
    page = (ROOT / "docs" / "corpora.md").read_text()
    rows = re.findall(r"^\| [^|]+ \| `(\w+)\.(\w+)` \| ([^|]+) \|$", page, re.MULTILINE)
    recipe = load_recipe("uvit-s-mmdialog")
    named = {section: {name for part, name, _ in rows if part == section} for section, _, _ in rows}
    others = {"descriptions", "image_root", "open_images_url", "split_shares", "split_seed"}
    assert named["corpus"] | others == set(type(recipe.corpus).model_fields)
    of_training = {"latents", "encode", "format", "roles"}
    assert named["text"] | of_training == set(type(recipe.text).model_fields)
    for section, name, values in rows:
        default = getattr(getattr(recipe, section), name)
        listed = re.match(r"`([^`]+)`", values)
        if default is None:
            assert values.startswith("unset:") or listed is not None, name
        else:
            assert listed is not None, name
            assert listed[1] == str(default), name
        for value in re.findall(r"`([a-z]+)`", values):
            apply_settings(recipe, [f"{section}.{name}={value}"])


def test_readme_has_at_most_150_lines() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_links_between_documents_resolve() -> None:
    for document in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name}: {target}"
