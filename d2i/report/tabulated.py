"""A table as plain values, before it is written as HTML, Markdown or CSV."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Cell:
    """One value of a table.

    Args:
        value: A number, a text, or None for a blank.
        spec: How a number is rounded.
        std: A standard deviation that is printed with it.
        interval: Its 95 % confidence interval.
        by_paper: Whether the paper says so, and not an evaluation of ours.
    """

    value: float | str | None = None
    spec: str = ".2f"
    std: float | None = None
    interval: tuple[float, float] | None = None
    by_paper: bool = False


@dataclass(frozen=True)
class Row:
    """A row: its heading and its cells, and where they come from.

    Args:
        heading: What it is of.
        cells: Its values.
        card: The metric card of our numbers in short.
        paper: Where the paper's are from, and what is odd about them.
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
    """Write a cell as people read it."""
    if cell.value is None:
        return ""
    if isinstance(cell.value, str):
        return cell.value
    number = format(cell.value, cell.spec)
    return number if cell.std is None else f"{number} ± {format(cell.std, cell.spec)}"
