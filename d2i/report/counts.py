"""Rows of a table of counts: one column per split, and their sum."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from d2i.report.html import figure, is_number


def count_cells(values: Iterable[Any]) -> list[str]:
    """Return a cell with the count of each split, and their sum if there are several."""
    counts = list(values)
    if len(counts) > 1:
        counts.append(sum(counts) if all(map(is_number, counts)) else None)
    return [figure(count, ",") if is_number(count) else "not recorded" for count in counts]


def reason_rows(
    counts: Collection[Mapping[str, Any]], heading: Callable[[str], str]
) -> list[tuple[str, list[str]]]:
    """Make one row per reason, sorted, from the counts by reason of each split."""
    reasons = sorted({reason for found in counts for reason in found})
    return [
        (heading(reason), count_cells(found.get(reason, 0) for found in counts))
        for reason in reasons
    ]
