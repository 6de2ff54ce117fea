"""Progress of a command on stderr: a live bar on a terminal, elsewhere a line every few seconds.

Every command shows its progress through `ProgressBar`. rich is imported on a terminal only.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from d2i.io.terminal import is_terminal, plain

if TYPE_CHECKING:
    from d2i.io.live_bar import LiveBar

_SECONDS_BETWEEN_LINES = 5.0


@dataclass(frozen=True)
class Counts:
    """State of some work.

    Args:
        line: All of it in one line, for where there is no terminal.
        done: Items done, also by earlier commands.
        total: All items; None if unknown.
        unit: Name of the items, in the plural.
        started: Time at which this command began the work, on the monotonic clock.
        num_before: Items that earlier commands had done.
        failures: Number of failed items by reason; None for items that do not fail.
        note: More about the work, such as its part.
    """

    line: str
    done: int
    total: int | None
    unit: str
    started: float
    num_before: int = 0
    failures: Mapping[str, int] | None = None
    note: str = ""

    def items_per_s(self) -> float:
        """Return the mean rate since the work began."""
        return (self.done - self.num_before) / max(time.monotonic() - self.started, 1e-9)

    def left_s(self) -> float | None:
        """Return the seconds left at this rate; None if nobody can tell."""
        rate = self.items_per_s()
        return None if self.total is None or not rate else (self.total - self.done) / rate


class ProgressBar:
    """The progress of one command; use it with `contextlib.closing`."""

    def __init__(self) -> None:
        self._display = _display()

    def wait(self, line: str) -> None:
        """Name what the command waits for, until the first counts are shown."""
        self._display.wait(plain(line))

    def show(self, counts: Counts) -> None:
        """Show how far the work is."""
        self._display.show(counts)

    def close(self) -> None:
        """Keep the last state on the screen."""
        self._display.close()


def _display() -> LiveBar | _Lines:
    if not is_terminal(sys.stderr):
        return _Lines()
    from d2i.io.live_bar import LiveBar

    return LiveBar()


class _Lines:
    """A line every few seconds, for logs."""

    def __init__(self) -> None:
        self._shown = 0.0
        self._last = self._written = ""

    def wait(self, line: str) -> None:
        _write_line(line)

    def show(self, counts: Counts) -> None:
        self._last = plain(counts.line)
        now = time.monotonic()
        if now - self._shown >= _SECONDS_BETWEEN_LINES:
            _write_line(self._last)
            self._shown, self._written = now, self._last

    def close(self) -> None:
        if self._last != self._written:
            _write_line(self._last)


def _write_line(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()
