"""Parse the command lines of documents and cluster files as the command itself would."""

from __future__ import annotations

import shlex
from typing import Any

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
