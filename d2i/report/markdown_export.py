"""Export of the tables as Markdown and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence

from d2i.report.table import Cell, Table, shown

_HEAD = ("table", "row", "column", "value", "deviation", "low", "high", "by", "card")


def write_markdown(tables: Sequence[Table]) -> str:
    """Write tables as Markdown, each with its title and its notes."""
    return "\n".join(line for table in tables for line in _markdown(table))


def write_csv(tables: Sequence[Table]) -> str:
    """Write every cell that is not blank as a line: unrounded, with its source."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(_HEAD)
    for table in tables:
        for row in table.rows:
            for column, cell in zip(table.columns, row.cells, strict=True):
                if cell.value is not None:
                    values = [table.title, row.heading, column, *_values(cell)]
                    values += ["paper", row.paper] if cell.by_paper else ["d2i", row.card]
                    writer.writerow(map(_no_formula, values))
    return file.getvalue()


def _markdown(table: Table) -> Iterator[str]:
    yield f"## {_escaped(table.title)}\n"
    yield f"| |{'|'.join(map(_escaped, table.columns))}|"
    yield "|---" * (len(table.columns) + 1) + "|"
    for row in table.rows:
        yield f"|{_escaped(row.heading)}|{'|'.join(_escaped(_spoken(c)) for c in row.cells)}|"
    yield ""
    for note in table.notes:
        yield f"{_escaped(note)}\n"


def _spoken(cell: Cell) -> str:
    if cell.interval is None:
        return shown(cell)
    low, high = (format(end, cell.spec) for end in cell.interval)
    return f"{shown(cell)} ({low} to {high})"


def _values(cell: Cell) -> list[object]:
    low, high = cell.interval or ("", "")
    return [cell.value, "" if cell.std is None else cell.std, low, high]


def _no_formula(cell: object) -> object:
    """Escape a cell that a spreadsheet would take for a formula: labels are untrusted text."""
    if isinstance(cell, str) and cell.startswith(("=", "+", "-", "@", "\t", "\r")):
        return f"'{cell}"
    return cell


def _escaped(cell_text: str) -> str:
    return cell_text.replace("|", "\\|").replace("\n", " ")
