"""The paper's tables, ours beside theirs: systems, linearizations, recipes; and who listens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from d2i.metric_specs import METRICS, PAPER_METRICS, RECALLS, MetricSpec
from d2i.recipes import RECIPES
from d2i.report.comparable import (
    card_summary,
    context_of,
    group_by_metric,
    is_plain,
    strategy_of,
    why_apart,
)
from d2i.report.evaluation import Evaluation, tell_apart
from d2i.report.markup import is_number
from d2i.report.paper import (
    PUBLISHED_EXTRACTOR,
    SYSTEM_OF_TABLE_3,
    PaperScores,
    paper_row,
    paper_table2,
    paper_table3,
    paper_table5,
)
from d2i.report.tabulated import Cell, Row, Table

_STRATEGIES = ("space", "special", "letters", "hash")
_CONTEXTS = ("full", "last", "none", "shuffled")
_CORPORA = {"photochat": "PhotoChat", "mmdialog": "MMDialog"}
_OTHERS = tuple(METRICS[key] for key in ("clip_t", "fid_clip", *(f"recall_{k}" for k in RECALLS)))
_COLUMNS = (
    *(title for m in PAPER_METRICS for title in (m.title, f"{m.title} (paper)")),
    *(metric.title for metric in _OTHERS),
    "pictures",
)
_NO_PAPER: PaperScores = {}
_SAME_DESCRIPTIONS = "Divter: MMDialog has no descriptions; it learned from our captions."


def table2(evaluations: Sequence[Evaluation]) -> list[Table]:
    """Systems by corpus, as the paper's Table 2; what cannot be compared is a table of its own."""
    tables = []
    for corpus, group in _by(evaluations, lambda e: e.card.get("corpus")):
        parts = group_by_metric([e for e in group if is_plain(e)])
        # The paper's systems that nobody evaluated are named once.
        with_absent = next(filter(_is_published, parts), None)
        for number, part in enumerate(parts):
            table = _systems(corpus, part, is_whole=part is with_absent)
            tables.append(_set_apart(table, number, part, parts[0]) if number else table)
    return tables


def _set_apart(
    table: Table, number: int, part: Sequence[Evaluation], first: Sequence[Evaluation]
) -> Table:
    """Title a table that is not comparable with the first, and say why."""
    note = f"Kept apart, as not comparable: {why_apart(part, first)}."
    title = f"{table.title}, apart" + (f" ({number})" if number > 1 else "")
    return replace(table, title=title, notes=(note, *table.notes))


def table3(evaluations: Sequence[Evaluation]) -> list[Table]:
    """The linearizations of one system, as the paper's Table 3."""
    tables = []
    full = [e for e in evaluations if context_of(e) == "full"]
    for (corpus, name), group in _by(full, _system):
        if len({strategy_of(e) for e in group}) < 2:
            continue
        paper = paper_table3() if (corpus, name) == ("photochat", SYSTEM_OF_TABLE_3) else {}
        tables += _variants(
            f"Linearizations: {name} on {_corpus(corpus)}", group, strategy_of, _STRATEGIES, paper
        )
    return tables


def listening(evaluations: Sequence[Evaluation]) -> list[Table]:
    """One system shown the whole dialog, its last turn, nothing, and another dialog."""
    tables = []
    hashed = [e for e in evaluations if strategy_of(e) == "hash"]
    for (corpus, name), group in _by(hashed, _system):
        if len({context_of(e) for e in group}) > 1:
            title = f"What the system is shown: {name} on {_corpus(corpus)}"
            tables += _variants(title, group, context_of, _CONTEXTS, {})
    return tables


def table5() -> Table:
    """The recipes of the paper's six runs, ours beside its Table 5."""
    rows = [
        Row(
            f"{_CORPORA[corpus]}, {name}",
            (
                *_pair(recipe.image.resolution, resolution),
                *_pair(recipe.train.global_batch_size, batch),
                Cell(devices, by_paper=True),
                Cell(float(recipe.train.num_steps), ",.0f"),
            ),
        )
        for corpus, systems in paper_table5().items()
        for name, (resolution, batch, devices) in systems.items()
        for recipe in [RECIPES[f"{_recipe_name(name)}-{corpus}"]()]
    ]
    columns = (
        *("resolution", "resolution (paper)", "global batch", "global batch (paper)"),
        *("devices (paper)", "steps (ours)"),
    )
    return Table("Recipes (Table 5)", columns, tuple(rows))


def _systems(corpus: str, part: Sequence[Evaluation], *, is_whole: bool) -> Table:
    """Make a row of each system, and with `is_whole` of those that the paper alone has."""
    paper, notes = paper_table2(corpus), []
    if paper and not _is_published(part):
        paper = {}
        notes.append(
            f"The paper's numbers are left out: they are on {PUBLISHED_EXTRACTOR}, these on "
            f"{part[0].card.get('extractor')}."
        )
    if any(e.card.get("kind") == "divter" and corpus == "mmdialog" for e in part):
        notes.append(_SAME_DESCRIPTIONS)
    names = [paper_row(evaluation.card) for evaluation in part]
    named: list[tuple[str, str, Evaluation | None]] = [
        (name, _heading(heading, corpus, evaluation), evaluation)
        for name, heading, evaluation in zip(names, tell_apart(names, part), part, strict=True)
    ]
    absent = set(paper) - {name for name, *_ in named} if is_whole else ()
    named += [(name, name, None) for name in absent]
    rows = [
        _row(heading, evaluation, paper.get(name, _NO_PAPER))
        for name, heading, evaluation in sorted(named, key=lambda n: _place(n[0], list(paper)))
    ]
    return Table(f"Systems on {_corpus(corpus)} (Table 2)", _COLUMNS, tuple(rows), tuple(notes))


def _variants(
    title: str,
    group: Sequence[Evaluation],
    variant: Callable[[Evaluation], str],
    order: Sequence[str],
    paper: dict[str, PaperScores],
) -> list[Table]:
    """Make a row of each variant of one system, in tables by metric."""
    parts = group_by_metric(group)
    tables = []
    for part in parts:
        beside = paper if _is_published(part) else {}
        chosen = sorted(part, key=lambda e: _place(variant(e), order))
        headings = tell_apart([variant(e) for e in chosen], chosen)
        rows = [
            _row(heading, e, beside.get(variant(e), _NO_PAPER))
            for heading, e in zip(headings, chosen, strict=True)
        ]
        apart = [] if part is parts[0] else [f"Kept apart: {why_apart(part, parts[0])}."]
        tables.append(Table(title, _COLUMNS, tuple(rows), tuple(apart)))
    return tables


def _row(heading: str, evaluation: Evaluation | None, paper: PaperScores) -> Row:
    cells = (
        *(c for m in PAPER_METRICS for c in (_score(evaluation, m), _by_paper(paper, m))),
        *(_score(evaluation, metric) for metric in _OTHERS),
        Cell(_counts(evaluation)),
    )
    return Row(heading, cells, card_summary(evaluation) if evaluation else "")


def _by_paper(paper: PaperScores, metric: MetricSpec) -> Cell:
    value, std = paper.get(metric.key, (None, None))
    return Cell(value, metric.spec, std, by_paper=True)


def _score(evaluation: Evaluation | None, metric: MetricSpec) -> Cell:
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


def _counts(evaluation: Evaluation | None) -> str | None:
    if evaluation is None:
        return None
    return f"{evaluation.card.get('found')} of {evaluation.card.get('expected')}"


def _pair(ours: int, paper: int) -> tuple[Cell, Cell]:
    return Cell(float(ours), ",.0f"), Cell(float(paper), ",.0f", by_paper=True)


def _heading(name: str, corpus: str, evaluation: Evaluation) -> str:
    is_by_our_captions = evaluation.card.get("kind") == "divter" and corpus == "mmdialog"
    return f"{name}, our captions" if is_by_our_captions else name


def _place(name: str, order: Sequence[str]) -> int:
    return order.index(name) if name in order else len(order)


def _by(
    evaluations: Sequence[Evaluation], key: Callable[[Evaluation], Any]
) -> Iterator[tuple[Any, list[Evaluation]]]:
    """Group evaluations that name their corpus, in order of appearance."""
    groups: dict[Any, list[Evaluation]] = {}
    for evaluation in evaluations:
        if evaluation.card.get("corpus"):
            groups.setdefault(key(evaluation), []).append(evaluation)
    yield from groups.items()


def _system(evaluation: Evaluation) -> tuple[str, str]:
    return str(evaluation.card["corpus"]), paper_row(evaluation.card)


def _is_published(part: Sequence[Evaluation]) -> bool:
    return part[0].card.get("extractor") == PUBLISHED_EXTRACTOR


def _corpus(name: str) -> str:
    return _CORPORA.get(name, name)


def _recipe_name(paper_name: str) -> str:
    return {
        "U-ViT-Small": "uvit-s",
        "U-ViT-Small(Deep)": "uvit-s-deep",
        "UniDiffuser-v1": "unidiffuser-v1",
    }[paper_name]
