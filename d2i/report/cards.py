"""The metric cards in full, side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from d2i.report.evaluation import Evaluation, column_names
from d2i.report.html import Section, table, text


def cards_section(evaluations: Sequence[Evaluation]) -> Section:
    """Show every field of every card and every score, unrounded, and mark those that differ."""
    cards = [dict(_flat({"scores": e.scores, "card": e.card})) for e in evaluations]
    fields = dict.fromkeys(field for card in cards for field in card)
    rows = [
        (
            _marked(field, len({repr(card.get(field)) for card in cards}) > 1),
            [f"<code>{text(card.get(field, 'absent'))}</code>" for card in cards],
        )
        for field in fields
    ]
    differs = " A dot marks the fields that differ." if len(cards) > 1 else ""
    intro = (
        '<p class="intro">Everything that the scores depend on, as stored in the files.'
        f"{differs}</p>"
    )
    head = ["Field", *(text(name) for name in column_names(evaluations))]
    return Section("cards", "Metric cards", intro + table(head, rows))


def _flat(fields: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each leaf of nested JSON with its dotted name."""
    for name, value in fields.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _marked(field: str, differs: bool) -> str:
    mark = '<span class="differs"><span class="hidden"> (differs)</span></span>' if differs else ""
    return text(field) + mark
