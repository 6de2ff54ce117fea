"""A progress bar that rich redraws on a terminal."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar as Bar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from d2i.io.terminal import plain, wants_colors

if TYPE_CHECKING:
    from d2i.io.progress_bar import Counts

_FRAMES_PER_S = 5.0
_MIN_BAR_COLUMNS = 6


class LiveBar:
    """The display of `ProgressBar` on a terminal: a spinner until the first counts, then a bar.

    What the process writes to stderr meanwhile appears above it.
    """

    def __init__(self) -> None:
        self._live: Live | None = None

    def wait(self, line: str) -> None:
        """Show a spinner."""
        # It goes when the command ends before it has counted anything.
        self._render(Spinner("dots", Text(line)), is_transient=True)

    def show(self, counts: Counts) -> None:
        """Show the bar."""
        self._render(_Rows(counts), is_transient=False)

    def close(self) -> None:
        """Leave the last bar on the screen."""
        if self._live:
            self._live.stop()
            self._live = None

    def _render(self, content: RenderableType, *, is_transient: bool) -> None:
        if self._live is None:
            self._live = Live(
                console=_console(), redirect_stdout=False, refresh_per_second=_FRAMES_PER_S
            )
        self._live.transient = is_transient
        self._live.update(content)
        self._live.start(refresh=True)


class _Console(Console):
    def show_cursor(self, show: bool = True) -> bool:
        """Leave the cursor as it is: a command that is killed could not show it again."""
        del show
        return False


def _console() -> Console:
    return _Console(stderr=True, color_system="auto" if wants_colors() else None, highlight=False)


class _Rows:
    """Two rows: the bar with done, total, rate and time left; then notes and failures."""

    def __init__(self, counts: Counts) -> None:
        # Between two counts nothing changes: a time left that is recomputed would grow.
        self._numbers = Text(_numbers(counts))
        self._details = Text(plain(_details(counts)))
        self._bar = Bar(total=counts.total, completed=counts.done)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        del console
        if options.max_width - self._numbers.cell_len > _MIN_BAR_COLUMNS:
            row = Table.grid(expand=True)
            row.add_column(ratio=1)
            row.add_column(no_wrap=True)
            row.add_row(self._bar, Text(" ") + self._numbers)
            yield row
        else:
            yield self._numbers
        if self._details:
            yield self._details


def _numbers(counts: Counts) -> str:
    total = "" if counts.total is None else f"/{counts.total}"
    left = counts.left_s()
    time_left = "" if left is None else f"  {timedelta(seconds=round(left))} left"
    return f"{counts.done}{total} {counts.unit}  {_rate(counts.items_per_s())}/s{time_left}"


def _rate(rate: float) -> str:
    return f"{rate:.0f}" if rate >= 10 else f"{rate:.2g}"


def _details(counts: Counts) -> str:
    parts = [counts.note] if counts.note else []
    if counts.failures is not None:
        reasons = ", ".join(f"{number} {reason}" for reason, number in counts.failures.items())
        parts.append(f"failed: {sum(counts.failures.values())}" + (reasons and f" ({reasons})"))
    return "  ".join(parts)
