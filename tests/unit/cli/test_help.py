"""The pages of --help: groups, uncut sentences and examples, colors on a terminal only."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from d2i.cli.app import app
from tests.command_lines import every_command, examples_in, help_page
from tests.processes import COMMAND, run_process
from tests.terminal import run_on_terminal, screen_lines

PANEL = re.compile(r"^╭─ (.+?) ─*╮$\n(.*?)^╰─*╯$", re.MULTILINE | re.DOTALL)
COMMANDS = every_command(get_command(app))
DEMO = "d2i-demo/"


def panels(page: str) -> dict[str, list[str]]:
    """Return the rows of each panel of a page, by its title."""
    return {
        title: [line.strip("│ ") for line in rows.splitlines()]
        for title, rows in PANEL.findall(page)
    }


def test_help_on_terminal_has_groups_of_whole_sentences() -> None:
    shown = run_on_terminal("--help")
    assert shown.returncode == 0
    found = panels("\n".join(shown.screen()))
    assert list(found) == ["Start here", "Data", "Training", "Evaluation", "Machine", "Options"]
    listed = {title: [row.split()[0] for row in rows] for title, rows in found.items()}
    assert listed["Data"] == ["corpus", "preprocess", "index", "verify", "repair", "inspect"]
    assert listed["Machine"] == ["doctor", "cluster"]
    for rows in list(found.values())[:-1]:
        for row in rows:
            # A sentence that is broken or cut has no capital at one end, or no full stop.
            assert re.fullmatch(r"[a-z]+ {2,}[A-Z][^…]*[^.…]\.", row), row


@pytest.mark.parametrize("command", [c for c in COMMANDS if hasattr(c, "commands")], ids=str)
def test_command_of_every_group_has_sentence_of_one_line(command: Any) -> None:
    rows = [row for rows in panels(help_page(command)).values() for row in rows]
    for name, child in command.commands.items():
        text = child.short_help or child.help
        assert [row for row in rows if re.fullmatch(rf"{name} +{re.escape(text)}", row)], name
        assert text.endswith("."), text


@pytest.mark.parametrize("columns", [50, 80, 200])
@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_nothing_on_page_is_cut(command: Any, columns: int) -> None:
    page = help_page(command, columns)
    assert "…" not in page
    framed = [line for line in page.splitlines() if line.startswith(("│", "╭", "╰"))]
    assert {len(line) for line in framed} == {columns}
    words = " ".join(" ".join(rows) for rows in panels(page).values())
    for parameter in command.params:
        for option in parameter.opts if not parameter.hidden else ():
            assert option in words
    for row in re.split(r"\s+", inspect.cleandoc(command.help or "")):
        assert row in page


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_examples_are_one_line_each_on_narrow_terminal(command: Any) -> None:
    paragraphs = (command.help or "").partition("Examples:")[2].strip().split("\n\n")
    written = [paragraph for paragraph in paragraphs if paragraph]
    assert examples_in(help_page(command, columns=50)) == written
    assert all(re.match(r"(echo '[^']+' \| )?d2i ", line) for line in written)


def test_help_has_no_escape_codes_without_terminal_or_with_no_color() -> None:
    for arguments in (("--help",), ("eval", "--help")):
        piped = run_process(*arguments, env={"GITHUB_ACTIONS": "true", "FORCE_COLOR": "1"})
        plain = run_on_terminal(*arguments, env={"NO_COLOR": "1"}).terminal
        colored = run_on_terminal(*arguments).terminal
        assert (
            "\x1b"
            not in piped.stdout + plain + run_on_terminal(*arguments, env={"TERM": "dumb"}).terminal
        )
        assert "\x1b[" in colored
        assert screen_lines(colored) == screen_lines(plain)


def test_help_of_piped_command_in_ascii_is_readable() -> None:
    done = run_process("--help", env={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0, done.stderr
    assert "Turn conversations and images into shards of latents." in done.stdout


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_fault_option_is_hidden(command: Any) -> None:
    assert "--fault" not in help_page(command)


def test_help_imports_neither_typers_own_pages_nor_heavy_modules() -> None:
    heavy = ("torch", "ray", "numpy", "pydantic", "typer.rich_utils", "pygments", "markdown_it")
    code = (
        "import sys, atexit\n"
        "from d2i.cli import main\n"
        f"atexit.register(lambda: print([m for m in {heavy!r} if m in sys.modules]))\n"
        "main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "--help"], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


def completions(line: str, tmp_path: Path) -> list[str]:
    """Return what bash completes at the end of a line, by the script that d2i prints."""
    command = tmp_path / "d2i"
    command.write_text(f"#!{COMMAND[0]}\n{COMMAND[2]}\n")
    command.chmod(0o755)
    words = line.split(" ")
    script = (
        'eval "$("$0" --show-completion)"\n'
        f"COMP_WORDS=({' '.join(words)}) COMP_CWORD={len(words) - 1}\n"
        'complete -p d2i >&2; _d2i_completion "$0"\n'
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(
        ["bash", "--norc", "-c", script, str(command)], capture_output=True, text=True, check=True
    )
    assert done.stderr == "complete -o default -F _d2i_completion d2i\n"
    return done.stdout.split()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("d2i pre", ["preprocess"]),
        ("d2i train --recipe uvit-s-d", ["uvit-s-deep-photochat", "uvit-s-deep-mmdialog"]),
        ("d2i recipes show dem", ["demo"]),
        ("d2i corpus --corpus m", ["mmdialog"]),
        ("d2i eval --system r", ["run:", "retrieve:"]),
        ("d2i eval --context sh", ["shuffled"]),
        ("d2i select --metric clip_", ["clip_i", "clip_t"]),
        ("d2i select --system r", ["run:"]),
        ("d2i select --system d", ["diffusers:"]),
    ],
)
def test_bash_completes(line: str, expected: list[str], tmp_path: Path) -> None:
    assert completions(line, tmp_path) == expected


def test_completed_names_are_those_that_commands_take() -> None:
    from d2i.backbones import backbones
    from d2i.cli.completion import CORPORA, SYSTEMS
    from d2i.corpora import CORPORA as KNOWN
    from d2i.eval import systems

    assert list(CORPORA) == list(KNOWN)
    kinds = {kind.removesuffix(":") for kind in SYSTEMS}
    assert kinds == systems._BUILDERS.keys() - backbones().keys()


def test_examples_begin_with_what_the_demo_makes() -> None:
    for command in COMMANDS:
        needs_files = any(p.name in {"data", "run", "directory", "source"} for p in command.params)
        if needs_files and command.name not in {"push", "index"}:
            assert DEMO in examples_in(help_page(command))[0], command.name


def test_command_without_arguments_is_help_on_stderr() -> None:
    done = run_process()
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == run_process("--help").stdout
