"""Parse the command lines of documents and cluster files as the command itself would."""

from __future__ import annotations

import os
import shlex
from typing import Any
from unittest.mock import patch

from typer.main import get_command

from d2i.cli.app import app


def every_command(command: Any) -> list[Any]:
    """Yield the command and all of its subcommands."""
    inner = getattr(command, "commands", {}).values()
    return [command, *(leaf for child in inner for leaf in every_command(child))]


def parse_d2i(line: str) -> None:
    """Parse one d2i command line as the command itself would, without running it."""
    words = shlex.split(line.split("d2i ", 1)[1])
    command: Any = get_command(app)
    while hasattr(command, "commands") and words and words[0] in command.commands:
        command, words = command.commands[words[0]], words[1:]
    command.make_context("d2i", words, resilient_parsing=False)


def help_page(command: Any, columns: int = 80) -> str:
    """Return the --help of a command on a terminal of some width, without colors."""
    context = command.context_class(command, info_name="d2i")
    with patch.dict(os.environ, {"COLUMNS": str(columns)}):
        page: str = command.get_help(context)
    return page


def examples_in(page: str) -> list[str]:
    """Return the example commands of a --help."""
    text = page.partition("\nExamples:\n")[2]
    return [line.strip() for line in text.splitlines() if line.strip()]
