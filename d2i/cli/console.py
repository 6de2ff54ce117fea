"""What every command shares: results, progress lines, and the options that many take."""

from __future__ import annotations

import inspect
import json
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from d2i.errors import ConfigError
from d2i.terminal import plain

INTERRUPTED = 130
"""The exit code after Ctrl-C."""
_SECONDS_BETWEEN_LINES = 5.0

CorpusOption = Annotated[str, typer.Option("--corpus", help="mmdialog, photochat or jsonl.")]
SourceOption = Annotated[str, typer.Option("--source", help="The corpus's folder, a path or URL.")]
RecipeOption = Annotated[
    str,
    typer.Option("--recipe", help="A recipe's name ('d2i recipes'), or package.module:function."),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Change a setting, e.g. image.resolution=64."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="End with one JSON line on stdout.")]
RayOption = Annotated[
    str | None, typer.Option("--ray-address", help="A running Ray cluster; else Ray starts here.")
]
WorkersOption = Annotated[
    int | None, typer.Option(min=0, help="Ray workers; 0: this process, without Ray.")
]
FetchWorkersOption = Annotated[
    int | None, typer.Option(min=1, help="Ray workers that fetch and decode.")
]
CacheDirOption = Annotated[
    Path | None, typer.Option("--cache-dir", help="Local folder for shards that lie elsewhere.")
]
CacheGbOption = Annotated[
    float | None,
    typer.Option("--cache-gb", min=0, help="The most it may hold, in 1e9 bytes; else all."),
]
CheckDataOption = Annotated[
    bool,
    typer.Option(
        "--check-data/--no-check-data",
        help="Compare data with its checksums when first read; not needed after d2i verify.",
    ),
]
FaultOption = Annotated[
    str | None, typer.Option("--fault", help="POINT:error|sleep|kill:N, for proofs.")
]


def register(app: typer.Typer, function: Callable[..., None], name: str | None = None) -> None:
    """Give a command to an app, its examples in --help one to a line, as they can be typed."""
    app.command(name, help=help_text(function))(function)


def help_text(function: Callable[..., None]) -> str:
    """Return a command's docstring with its examples kept from being wrapped."""
    paragraphs = inspect.cleandoc(function.__doc__ or "").split("\n\n")
    return "\n\n".join(_unwrapped(paragraph) for paragraph in paragraphs)


def _unwrapped(paragraph: str) -> str:
    if not paragraph.startswith("    "):
        return paragraph
    # The parser's sign for a paragraph that is to stay as it is.
    return f"\b\n  {' '.join(paragraph.split())}"


class ProgressLine:
    """One changing line on a terminal; elsewhere a line every few seconds."""

    def __init__(self) -> None:
        self._shown = 0.0
        self._last = ""

    def show(self, line: str) -> None:
        """Show how far the work is."""
        line = plain(line)
        now = time.monotonic()
        if sys.stderr.isatty():
            sys.stderr.write(f"\r\033[K{line}")
        elif now - self._shown >= _SECONDS_BETWEEN_LINES:
            sys.stderr.write(f"{line}\n")
            self._shown = now
        self._last = line
        sys.stderr.flush()

    def close(self) -> None:
        """Leave the last line standing."""
        if self._last:
            sys.stderr.write("\n" if sys.stderr.isatty() else f"{self._last}\n")


def print_result(result: dict[str, Any], lines: Iterable[str], *, as_json: bool) -> None:
    """Print a command's result: one JSON line for machines, or lines for people."""
    if as_json:
        typer.echo(json.dumps(result, sort_keys=True))
        return
    for line in lines:
        typer.echo(plain(line))


def row_line(status: str, name: str, detail: str, fix: str) -> str:
    """Return one row of a report on what can run, with the fix where one is needed."""
    return plain(f"{status:5} {name}: {detail}" + (f"  -> {fix}" if fix else ""))


def existing_source(source: str) -> str:
    """Return the folder of a corpus.

    Raises:
        ConfigError: If it is not there.
    """
    from d2i import storage

    if not storage.exists(source):
        raise ConfigError(f"--source {source}: no such folder; expected a corpus; check the path")
    return source


def counted(counts: dict[str, int]) -> str:
    """Return `2 missing_file, 1 decode_error`, or `none`."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{number} {name}" for name, number in ordered) or "none"
