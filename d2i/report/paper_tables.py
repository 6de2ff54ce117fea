"""The paper's systems and recipes, with ours beside them (Tables 2 and 5), and our gains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from d2i.corpora import corpus_title, has_captions
from d2i.metric_specs import PAPER_METRICS
from d2i.recipes import RECIPES
from d2i.report.comparable import (
    group_by,
    group_by_metric,
    incompatibility_reason,
    is_plain,
    place,
)
from d2i.report.evaluation import Evaluation, disambiguate, is_baseline
from d2i.report.paper_rows import (
    BACKBONES,
    PaperScores,
    comparison_mismatches,
    matching_row,
    paper_gain,
    paper_notes,
    paper_row,
    paper_table2,
    paper_table5,
    paper_words,
    row_mismatches,
)
from d2i.report.score_rows import NO_PAPER, Gains, score_row, score_table
from d2i.report.table import Cell, Row, Table, is_number

GAIN = "Gain: score after fine-tuning minus before, of the same network on the same text."
_OUR_CAPTIONS = "Divter: trained on our captions, because {corpus} has none."


def table2(evaluations: Sequence[Evaluation]) -> list[Table]:
    """Return the systems by corpus, as in the paper's Table 2; one table per comparable group."""
    tables = []
    plain = [e for e in evaluations if is_plain(e) and e.card.get("corpus")]
    for corpus, group in group_by(plain, lambda e: str(e.card["corpus"])):
        parts = group_by_metric(group)
        # The paper's systems that were not evaluated are listed only once.
        with_absent = next(filter(_is_beside_paper, parts), None)
        for number, part in enumerate(parts):
            table = _systems(corpus, part, is_whole=part is with_absent)
            tables.append(_set_apart(table, number, part, parts[0]) if number else table)
    return tables


def table5() -> Table:
    """Return the recipes of the paper's six runs, with ours beside those of its Table 5."""
    presets = {title: name for name, title in BACKBONES.items()}
    rows = [
        Row(
            f"{corpus_title(corpus)}, {name}",
            (
                *_pair(recipe.image.resolution, resolution),
                *_pair(recipe.train.global_batch_size, batch),
                Cell(devices, by_paper=True),
                Cell(float(recipe.train.num_steps), ",.0f"),
            ),
        )
        for corpus, systems in paper_table5().items()
        for name, (resolution, batch, devices) in systems.items()
        for recipe in [RECIPES[f"{presets[name]}-{corpus}"]()]
    ]
    columns = (
        *("resolution", "resolution (paper)", "global batch", "global batch (paper)"),
        *("devices (paper)", "steps (d2i)"),
    )
    return Table("Recipes (Table 5)", columns, tuple(rows))


def _set_apart(
    table: Table, number: int, part: Sequence[Evaluation], first: Sequence[Evaluation]
) -> Table:
    """Retitle a table that is not comparable with the first, and note the reason."""
    note = f"Not comparable with the first table: {incompatibility_reason(part, first)}."
    title = f"{table.title}, not comparable" + (f" ({number})" if number > 1 else "")
    return replace(table, title=title, notes=(note, *table.notes))


def _systems(corpus: str, part: Sequence[Evaluation], *, is_whole: bool) -> Table:
    """Make a row for each system, and with `is_whole` for those that only the paper has."""
    paper = paper_table2(corpus) if _is_beside_paper(part) else {}
    earned = [matching_row(evaluation.card) or "" for evaluation in part]
    names = disambiguate([_heading(corpus, evaluation) for evaluation in part], part)
    named: list[tuple[str, str, Evaluation | None]] = list(zip(earned, names, part, strict=True))
    absent = set(paper) - set(earned) if is_whole else ()
    named += [(name, name, None) for name in absent]
    order = list(paper)
    rows = [
        score_row(
            heading,
            evaluation,
            paper.get(row, NO_PAPER),
            paper_words("table2", row, corpus) if row in paper else "",
            gains(evaluation, part, paper, row),
        )
        for row, heading, evaluation in sorted(named, key=lambda named: place(named[0], order))
    ]
    title = f"Systems on {corpus_title(corpus)}" + (" (Table 2)" if paper else "")
    return score_table(title, rows, _notes(corpus, part, names))


def _notes(corpus: str, part: Sequence[Evaluation], names: Sequence[str]) -> list[str]:
    """Explain the numbers, why some are missing, and which systems have no row of the paper."""
    is_beside, notes = _is_beside_paper(part), []
    if is_beside or any(find_baseline(evaluation, part) for evaluation in part):
        notes.append(GAIN)
    if any(_has_our_captions(corpus, evaluation) for evaluation in part):
        notes.append(_OUR_CAPTIONS.format(corpus=corpus_title(corpus)))
    if is_beside:
        return [*notes, *_unearned(part, names), *paper_notes("table2", corpus)]
    if paper_table2(corpus):
        reasons = "; ".join(comparison_mismatches(part[0].card))
        notes.append(f"The paper's numbers are omitted: {reasons}.")
    return notes


def _unearned(part: Sequence[Evaluation], names: Sequence[str]) -> list[str]:
    return [
        f"{name}: not the paper's row: {'; '.join(reasons)}."
        for name, evaluation in zip(names, part, strict=True)
        if (reasons := row_mismatches(evaluation.card))
    ]


def _pair(ours: int, paper: int) -> tuple[Cell, Cell]:
    return Cell(float(ours), ",.0f"), Cell(float(paper), ",.0f", by_paper=True)


def _heading(corpus: str, evaluation: Evaluation) -> str:
    ours = ", our captions" if _has_our_captions(corpus, evaluation) else ""
    return paper_row(evaluation.card) + ours


def _has_our_captions(corpus: str, evaluation: Evaluation) -> bool:
    """Return whether a Divter of the paper's corpora was trained on other captions than theirs."""
    is_of_paper = bool(paper_table2(corpus))
    return evaluation.card.get("kind") == "divter" and is_of_paper and not has_captions(corpus)


def _is_beside_paper(part: Sequence[Evaluation]) -> bool:
    return any(not comparison_mismatches(evaluation.card) for evaluation in part)


def gains(
    evaluation: Evaluation | None,
    beside: Sequence[Evaluation],
    rows: Mapping[str, PaperScores],
    name: str,
) -> Gains:
    """Return the gain of fine-tuning, ours and the paper's, by key of each of the paper's metrics.

    Args:
        evaluation: The fine-tuned system's; None if only the paper has the system.
        beside: The evaluations whose scores are comparable with it.
        rows: The comparable rows of the paper.
        name: The row that the system earned.
    """
    before = find_baseline(evaluation, beside) if evaluation else None
    found = {}
    for metric in PAPER_METRICS:
        ours = None
        if evaluation and before:
            values = [e.scores.get(metric.key) for e in (before, evaluation)]
            if is_number(values[0]) and is_number(values[1]):
                ours = float(values[1] - values[0])
        found[metric.key] = (ours, paper_gain(rows, name, metric.key))
    return found


def find_baseline(evaluation: Evaluation, beside: Sequence[Evaluation]) -> Evaluation | None:
    """Find the evaluation of the network that a run was fine-tuned from, on the same text.

    Returns None if it was not evaluated, or several evaluations match.
    """
    found = [e for e in beside if is_baseline(e, evaluation)]
    return found[0] if len(found) == 1 else None
