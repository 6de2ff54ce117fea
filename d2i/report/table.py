"""A table as plain values, before it is written as HTML, Markdown or CSV."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any, TypeGuard

_PARTS = {"": "d2i", " (paper)": "paper", " gain": "gain", " gain (paper)": "gain (paper)"}
_PART = re.compile(r"(?P<score>.*?)(?P<part>(?: gain)?(?: \(paper\))?)$")


@dataclass(frozen=True)
class Cell:
    """One value of a table.

    Args:
        value: A number, a text, or None for a blank.
        spec: Format specification that rounds a number, as `rounded` takes it.
        std: A standard deviation that is printed with it.
        interval: Its 95 % confidence interval.
        by_paper: True if the value is the paper's, not from an evaluation of ours.
        blank: Words in the place of a missing value.
        is_code: True for a text that a computer reads.
    """

    value: float | str | None = None
    spec: str = ".2f"
    std: float | None = None
    interval: tuple[float, float] | None = None
    by_paper: bool = False
    blank: str = ""
    is_code: bool = False


@dataclass(frozen=True)
class Row:
    """A row: its heading, its cells, and their sources.

    Args:
        heading: Name of the row.
        cells: Its values.
        card: Summary of the metric card of our numbers.
        paper: Source of the paper's numbers, and any peculiarities.
        note: An explanation below the heading.
        is_code: True if the heading is a text that a computer reads.
        differs: True to mark that its cells differ.
    """

    heading: str
    cells: tuple[Cell, ...]
    card: str = ""
    paper: str = "the paper"
    note: str = ""
    is_code: bool = False
    differs: bool = False


@dataclass(frozen=True)
class Table:
    """A table: title, column heads after the first, rows, notes below it, and the first head."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = field(default=())
    corner: str = ""

    @property
    def column_groups(self) -> list[tuple[str, list[str]]]:
        """The columns by score, each with its parts: d2i's value, the paper's, the gains.

        A column that shares its score with no other has no parts, and its own name.
        """
        matches = [_PART.fullmatch(column) for column in self.columns]
        found = [(m["score"], m["part"]) for m in matches if m]
        grouped = [
            (score, [part for _, part in parts]) for score, parts in groupby(found, lambda f: f[0])
        ]
        return [
            (score, [_PARTS[part] for part in parts]) if len(parts) > 1 else (score + parts[0], [])
            for score, parts in grouped
        ]


def without_blanks(table: Table) -> Table:
    """Leave out the columns and the rows that have no value."""
    kept = [
        place
        for place in range(len(table.columns))
        if any(row.cells[place].value is not None for row in table.rows)
    ]
    rows = (replace(row, cells=tuple(row.cells[place] for place in kept)) for row in table.rows)
    columns = tuple(table.columns[place] for place in kept)
    full = tuple(row for row in rows if any(cell.value is not None for cell in row.cells))
    return replace(table, columns=columns, rows=full)


def shown(cell: Cell) -> str:
    """Format a cell for reading."""
    if cell.value is None:
        return ""
    if isinstance(cell.value, str):
        return cell.value
    number = format(cell.value, cell.spec)
    return number if cell.std is None else f"{number} ± {format(cell.std, cell.spec)}"


def rounded(value: float, spec: str) -> str:
    """Format a number for a page.

    Args:
        value: The number.
        spec: A format specification, `MiB` for bytes or `duration` for seconds.
    """
    if spec == "MiB":
        return f"{value / 2**20:,.1f} MiB"
    if spec == "duration":
        return _duration(value).replace(" ", "\N{NO-BREAK SPACE}")
    number = format(value, spec).replace("-", "\N{MINUS SIGN}")
    return number.replace("%", "\N{NARROW NO-BREAK SPACE}%")


def is_number(value: Any) -> TypeGuard[float]:
    """Return whether a JSON value is a number that can be shown: finite, and not a boolean."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def number_cell(value: Any, spec: str, blank: str = "") -> Cell:
    """Return the cell of a JSON value that should be a number."""
    return Cell(value, spec) if is_number(value) else Cell(blank=blank)


def count_cells(values: Iterable[Any]) -> tuple[Cell, ...]:
    """Return a cell with the count of each split, and their sum if there are several."""
    counts = list(values)
    if len(counts) > 1:
        counts.append(sum(counts) if all(map(is_number, counts)) else None)
    return tuple(number_cell(count, ",", "not recorded") for count in counts)


def reason_rows(
    counts: Collection[Mapping[str, Any]], heading: Callable[[str], tuple[str, str]]
) -> list[Row]:
    """Make one row per reason, sorted, from the counts by reason of each split.

    Args:
        counts: The counts of each split.
        heading: Returns the heading and the note of a reason's row.
    """
    rows = []
    for reason in sorted({reason for found in counts for reason in found}):
        name, note = heading(reason)
        rows.append(Row(name, count_cells(found.get(reason, 0) for found in counts), note=note))
    return rows


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min {rest:02d} s"
