"""A table as plain values, before it is written as HTML, Markdown or CSV."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Cell:
    """One value of a table.

    Args:
        value: A number, a text, or None for a blank.
        spec: Format specification that rounds a number.
        std: A standard deviation that is printed with it.
        interval: Its 95 % confidence interval.
        by_paper: True if the value is the paper's, not from an evaluation of ours.
    """

    value: float | str | None = None
    spec: str = ".2f"
    std: float | None = None
    interval: tuple[float, float] | None = None
    by_paper: bool = False


@dataclass(frozen=True)
class Row:
    """A row: its heading, its cells, and their sources.

    Args:
        heading: Name of the row.
        cells: Its values.
        card: Summary of the metric card of our numbers.
        paper: Source of the paper's numbers, and any peculiarities.
    """

    heading: str
    cells: tuple[Cell, ...]
    card: str = ""
    paper: str = "the paper"


@dataclass(frozen=True)
class Table:
    """A table: title, column heads after the first, rows, and notes below it."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = field(default=())


def shown(cell: Cell) -> str:
    """Format a cell for reading."""
    if cell.value is None:
        return ""
    if isinstance(cell.value, str):
        return cell.value
    number = format(cell.value, cell.spec)
    return number if cell.std is None else f"{number} ± {format(cell.std, cell.spec)}"
