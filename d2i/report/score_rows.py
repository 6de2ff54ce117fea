"""Rows of scores, shared by the paper tables: ours, the paper's beside them, and the gains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from d2i.metric_specs import METRICS, PAPER_METRICS, MetricSpec
from d2i.report.comparable import card_summary, guidance_words
from d2i.report.evaluation import Evaluation
from d2i.report.paper_rows import PaperScores
from d2i.report.table import Cell, Row, Table, is_number

NO_PAPER: PaperScores = {}
Gains = Mapping[str, tuple[float | None, float | None]]
"""Gain of fine-tuning by key of the metric: in our scores, and in the paper's."""
_OTHERS = tuple(metric for metric in METRICS.values() if metric not in PAPER_METRICS)
_GAIN = "gain"


def score_table(title: str, rows: Sequence[Row], notes: Sequence[str] = ()) -> Table:
    """Make a table of rows from `score_row`; columns without a value are left out.

    Scores of the paper's own metrics and the number of images always stay.
    """
    heads = _columns()
    kept = [
        place
        for place, (head, may_go) in enumerate(heads)
        if not may_go or any(row.cells[place].value is not None for row in rows)
    ]
    cut = [
        Row(row.heading, tuple(row.cells[place] for place in kept), row.card, row.paper)
        for row in rows
    ]
    return Table(title, tuple(heads[place][0] for place in kept), tuple(cut), tuple(notes))


def score_row(
    heading: str,
    evaluation: Evaluation | None,
    paper: PaperScores,
    paper_words: str = "",
    gains: Gains | None = None,
) -> Row:
    """Make a row.

    Args:
        heading: Name of the system.
        evaluation: Its scores; None if only the paper has the system.
        paper: The paper's scores, if they are shown beside.
        paper_words: Source of the paper's scores.
        gains: Gains of fine-tuning.
    """
    cells: list[Cell] = []
    for metric in PAPER_METRICS:
        ours, theirs = (gains or {}).get(metric.key, (None, None))
        value, std = paper.get(metric.key, (None, None))
        cells += [
            score_cell(evaluation, metric),
            Cell(value, metric.spec, std, by_paper=True),
            Cell(ours, f"+{metric.spec}"),
            Cell(theirs, f"+{metric.spec}", by_paper=True),
        ]
    cells += [score_cell(evaluation, metric) for metric in _OTHERS]
    card = evaluation.card if evaluation else {}
    cells += [Cell(guidance_words(card)), Cell(_counts(card))]
    return Row(heading, tuple(cells), card_summary(evaluation) if evaluation else "", paper_words)


def _columns() -> list[tuple[str, bool]]:
    """Return the column heads, each with whether it is left out if its column is blank."""
    columns: list[tuple[str, bool]] = []
    for metric in PAPER_METRICS:
        columns += [(metric.title, False), (f"{metric.title} (paper)", False)]
        columns += [(f"{metric.title} {_GAIN}", True), (f"{metric.title} {_GAIN} (paper)", True)]
    columns += [(metric.title, True) for metric in _OTHERS]
    return [*columns, ("guidance", True), ("images", False)]


def score_cell(evaluation: Evaluation | None, metric: MetricSpec) -> Cell:
    """Return a score with its deviation and interval; blank if there is none."""
    value = evaluation.scores.get(metric.key) if evaluation else None
    if evaluation is None or not is_number(value):
        return Cell()
    deviation = evaluation.scores.get(metric.std_key) if metric.std_key else None
    low_high = evaluation.intervals.get(metric.key)
    return Cell(
        float(value),
        metric.spec,
        float(deviation) if is_number(deviation) else None,
        (low_high[0], low_high[1]) if low_high else None,
    )


def _counts(card: Mapping[str, Any]) -> str | None:
    return f"{card.get('found')} of {card.get('expected')}" if card else None
