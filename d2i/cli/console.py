"""Shared parts of the commands: results, progress lines and common options."""

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
from d2i.io.terminal import plain

INTERRUPTED = 130
"""The exit code after Ctrl-C."""
_SECONDS_BETWEEN_LINES = 5.0

CorpusOption = Annotated[str, typer.Option("--corpus", help="mmdialog, photochat or jsonl.")]
SourceOption = Annotated[
    str, typer.Option("--source", help="Directory or file of the corpus, a path or URL.")
]
RecipeOption = Annotated[
    str,
    typer.Option("--recipe", help="A recipe's name ('d2i recipes'), or package.module:function."),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Change a setting, e.g. image.resolution=64."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as one JSON line.")]
RayOption = Annotated[
    str | None,
    typer.Option("--ray-address", help="A running Ray cluster; by default Ray starts here."),
]
WorkersOption = Annotated[
    int | None, typer.Option(min=0, help="Number of Ray workers; 0: this process, without Ray.")
]
FetchWorkersOption = Annotated[
    int | None, typer.Option(min=1, help="Number of Ray workers that fetch and decode.")
]
CacheDirOption = Annotated[
    Path | None, typer.Option("--cache-dir", help="Local directory that caches remote shards.")
]
CacheGbOption = Annotated[
    float | None,
    typer.Option(
        "--cache-gb", min=0, help="Maximum size of the cache, in 1e9 bytes; default: unlimited."
    ),
]
CheckDataOption = Annotated[
    bool,
    typer.Option(
        "--check-data/--no-check-data",
        help="Verify checksums when data is first read; not needed after d2i verify.",
    ),
]
FaultOption = Annotated[
    str | None, typer.Option("--fault", help="Inject a fault, for tests: POINT:error|sleep|kill:N.")
]


def register(app: typer.Typer, function: Callable[..., None], name: str | None = None) -> None:
    """Add a command to an app; each example in its --help is one line, ready to paste."""
    app.command(name, help=help_text(function))(function)


def help_text(function: Callable[..., None]) -> str:
    """Return a command's docstring, its examples protected from wrapping."""
    paragraphs = inspect.cleandoc(function.__doc__ or "").split("\n\n")
    return "\n\n".join(_unwrapped(paragraph) for paragraph in paragraphs)


def _unwrapped(paragraph: str) -> str:
    if not paragraph.startswith("    "):
        return paragraph
    # Click's mark for a paragraph that must not be rewrapped.
    return f"\b\n  {' '.join(paragraph.split())}"


class ProgressLine:
    """One changing line on a terminal; elsewhere a line every few seconds."""

    def __init__(self) -> None:
        self._shown = 0.0
        self._last = ""

    def show(self, line: str) -> None:
        """Show the progress of the work."""
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
        """Keep the last line on the screen."""
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
    """Return one row of a check's report, with the fix if one is needed."""
    return plain(f"{status:5} {name}: {detail}" + (f"  -> {fix}" if fix else ""))


def existing_source(source: str) -> str:
    """Return the URL of a corpus.

    Raises:
        ConfigError: If nothing is there.
    """
    from d2i.io import storage

    if not storage.exists(source):
        raise ConfigError(
            f"--source {source}: no such file or directory; expected a corpus; check the path"
        )
    return source


def counted(counts: dict[str, int]) -> str:
    """Return `2 missing_file, 1 decode_error`, or `none`."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{number} {name}" for name, number in ordered) or "none"
