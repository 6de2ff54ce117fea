"""The scores of systems that are in no table of the paper, side by side."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from d2i.corpora import corpus_title
from d2i.metric_specs import METRICS, MetricSpec
from d2i.report.comparable import card_summary
from d2i.report.document import OmittedSection, Section, tables_section
from d2i.report.evaluation import (
    MAX_NAMED,
    Evaluation,
    column_names,
    differing_fields,
    group_comparable,
)
from d2i.report.paper_tables import GAIN, find_baseline
from d2i.report.score_rows import score_cell
from d2i.report.table import Cell, Row, Table, is_number, number_cell

_TITLE = "Scores"


def scores_section(
    evaluations: Sequence[Evaluation], elsewhere: Collection[str] = ()
) -> Section | OmittedSection:
    """Show scores whose cards agree in one table, and others in separate tables.

    Args:
        evaluations: The systems.
        elsewhere: Summaries of the metric cards whose scores another section shows.
    """
    names = column_names(evaluations)
    own = [n for n, e in enumerate(evaluations) if card_summary(e) not in elsewhere]
    chosen = [evaluations[n] for n in own]
    groups = group_comparable(chosen)
    apart = (
        f"Not comparable, so shown in separate tables: they differ in "
        f"{', '.join(differing_fields(chosen))}."
        if len(groups) > 1
        else ""
    )
    tables = [
        _table([chosen[n] for n in group], [names[own[n]] for n in group]) for group in groups
    ]
    reason = "the tables above have them all"
    return tables_section("scores", _TITLE, tables, intro=apart, omitted=reason)


def _table(evaluations: Sequence[Evaluation], names: Sequence[str]) -> Table:
    metrics = [metric for metric in METRICS.values() if metric.on_page]
    if all(e.scores.get("fid_clip") == e.scores.get("fid") for e in evaluations):
        # The extractor is CLIP: it is the same number.
        metrics = [metric for metric in metrics if metric.key != "fid_clip"]
    rows = [
        Row(
            metric.long_title,
            tuple(_score(e, metric) for e in evaluations) + _gain(evaluations, metric),
            note=_direction(metric),
        )
        for metric in metrics
    ]
    accuracies = [(e.judged or {}).get("accuracy") or {} for e in evaluations]
    shares = tuple(number_cell(a.get("generated"), ".1%", "not judged") for a in accuracies)
    gain = (Cell(),) if _has_gain(evaluations) else ()
    rows.append(Row("Attribute accuracy", (*shares, *gain), note="higher is better"))
    columns = (*names, *(["Gain"] if gain else []))
    notes = (GAIN,) if gain else ()
    table = Table(_caption(evaluations), columns, tuple(rows), notes, corner="Score")
    return _turned(table) if len(evaluations) > MAX_NAMED else table


def _caption(evaluations: Sequence[Evaluation]) -> str:
    card = evaluations[0].card
    corpora = {str(e.card["corpus"]) for e in evaluations if e.card.get("corpus")}
    systems = f"Systems on {corpus_title(*corpora)}. " if len(corpora) == 1 else ""
    found = card.get("found")
    images = f", {found:,} images" if is_number(found) else ""
    return f"{systems}FID on {card.get('extractor', 'not recorded')}{images}"


def _turned(table: Table) -> Table:
    """Swap rows and columns, for more systems than fit the page's width."""
    rows = zip(table.columns, zip(*(row.cells for row in table.rows), strict=True), strict=True)
    columns = tuple(f"{row.heading} ({row.note.partition(',')[0]})" for row in table.rows)
    return Table(table.title, columns, tuple(Row(*row) for row in rows), corner="System")


def _direction(metric: MetricSpec) -> str:
    # The caption names the extractor for FID.
    is_other = metric.is_on_extractor and metric.key != "fid"
    return f"{metric.direction}{', on the same extractor' if is_other else ''}"


def _score(evaluation: Evaluation, metric: MetricSpec) -> Cell:
    cell = score_cell(evaluation, metric)
    return cell if cell.value is not None else Cell(blank="not scored")


def _has_gain(evaluations: Sequence[Evaluation]) -> bool:
    return len(evaluations) == 2 and find_baseline(evaluations[1], evaluations[:1]) is not None


def _gain(evaluations: Sequence[Evaluation], metric: MetricSpec) -> tuple[Cell, ...]:
    """Return the gain of fine-tuning, if the two systems are a network before and after it."""
    if not _has_gain(evaluations):
        return ()
    before, after = (e.scores.get(metric.key) for e in evaluations)
    if not (is_number(before) and is_number(after)):
        return (Cell(),)
    return (Cell(after - before, f"+{metric.spec}"),)
