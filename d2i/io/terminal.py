"""The terminal: whether there is one, and text that is safe for it.

Must not import any part of d2i.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from types import TracebackType
from typing import TextIO

# They only join letters and emoji: emoji of families, Persian and Hindi need them.
_JOINERS = "\u200c\u200d"


def plain(text: str, *, keep: str = "") -> str:
    r"""Return text that cannot move the cursor, set the clipboard or reverse a line.

    Invisible characters are written as escapes, such as `\x1b`: control characters, marks that
    change the text direction, lone surrogates. Letters, accents and emoji stay.

    Args:
        text: Untrusted text.
        keep: Further characters that stay, such as a newline.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in _JOINERS + keep else _shown(c) for c in text)


def _shown(character: str) -> str:
    # To Python, spaces other than the usual one are not printable.
    return " " if character.isspace() and ord(character) > 0x9F else repr(character)[1:-1]


class _PlainFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return plain(super().format(record), keep="\n\t")


def is_terminal(stream: TextIO) -> bool:
    """Return whether a stream is a terminal on which lines can be redrawn."""
    return stream.isatty() and os.environ.get("TERM") not in {"dumb", "unknown"}


def wants_colors() -> bool:
    """Return whether the user wants colors on a terminal (https://no-color.org)."""
    return not os.environ.get("NO_COLOR")


def print_plainly() -> None:
    """Escape control characters in the warnings and tracebacks of this process, too."""
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(_PlainFormatter())
    sys.excepthook = _print_traceback


def _print_traceback(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    lines = "".join(traceback.format_exception(kind, error, trace))
    sys.stderr.write(plain(lines, keep="\n\t"))
