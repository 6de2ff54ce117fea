"""Other people's text, as a terminal may be given it.

Must not import any part of d2i.
"""

from __future__ import annotations

import logging
import sys
import traceback
from types import TracebackType

# They only join letters and pictures: names of families, Persian and Hindi need them.
_JOINERS = "\u200c\u200d"


def plain(text: str, *, keep: str = "") -> str:
    r"""Return text that moves no cursor, sets no clipboard and turns no line around.

    What cannot be seen is written as its escape, such as `\x1b`: control characters, marks that
    change the direction of reading, halves of pairs. Letters, accents and emoji stay.

    Args:
        text: Of anybody.
        keep: Characters that stay besides, such as the end of a line.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in _JOINERS + keep else _shown(c) for c in text)


def _shown(character: str) -> str:
    # Other spaces than the usual one are not printable to Python.
    return " " if character.isspace() and ord(character) > 0x9F else repr(character)[1:-1]


class _PlainFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return plain(super().format(record), keep="\n\t")


def print_plainly() -> None:
    """Let warnings and tracebacks of this process hold no control characters either."""
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(_PlainFormatter())
    sys.excepthook = _print_traceback


def _print_traceback(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    lines = "".join(traceback.format_exception(kind, error, trace))
    sys.stderr.write(plain(lines, keep="\n\t"))
