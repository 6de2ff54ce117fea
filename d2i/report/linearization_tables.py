"""One system on variants of the same dialogs: linearizations (Table 3) and context ablation.

Evaluating a network on a linearization that it was not trained on is another experiment than the
paper's, which trains once for each, and is labelled so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from d2i.corpora import corpus_title
from d2i.report.comparable import (
    context_of,
    group_by,
    group_by_metric,
    incompatibility_reason,
    place,
    strategy_of,
)
from d2i.report.evaluation import Evaluation, disambiguate
from d2i.report.paper_rows import (
    SYSTEM_OF_TABLE_3,
    PaperScores,
    matching_row,
    own_name,
    paper_notes,
    paper_row,
    paper_table3,
    paper_words,
)
from d2i.report.score_rows import NO_PAPER, score_row, score_table
from d2i.report.table import Table

STRATEGIES = ("space", "special", "letters", "hash")
_CONTEXTS = ("full", "last", "none", "shuffled")
_AT_TEST_TIME = (
    "Changed at test time only, not the paper's experiment: one network is evaluated on "
    "linearizations that it was not trained on; the paper trains one for each."
)
_NOT_RECORDED = (
    "Cannot be matched with the paper's experiment: the linearization that these runs were trained "
    "on is not recorded; evaluate them again."
)


def table3(evaluations: Sequence[Evaluation]) -> list[Table]:
    """Return the linearizations of one system, as in Table 3; other experiments are separate."""
    full = [e for e in evaluations if context_of(e) == "full" and e.card.get("corpus")]
    tables = []
    for name, group in _trained_on_each(full):
        tables += _linearizations(f"Linearizations: {name}", group, paper_table3())
    for name, group in _at_test_time(full):
        title = f"Linearizations, changed at test time only: {name}"
        tables += _linearizations(title, group, {}, _AT_TEST_TIME)
    for name, group in _not_recorded(full):
        title = f"Linearizations, training text not recorded: {name}"
        tables += _linearizations(title, group, {}, _NOT_RECORDED)
    return tables


def context_ablation(evaluations: Sequence[Evaluation]) -> list[Table]:
    """Return one system's scores on the whole dialog, its last turn, nothing, another dialog."""
    tables = []
    hashed = [e for e in evaluations if strategy_of(e) == "hash" and e.card.get("corpus")]
    for name, group in group_by(hashed, _name):
        if len({context_of(e) for e in group}) > 1:
            title = f"Context ablation: {name}"
            tables += _variants(title, group, context_of, _CONTEXTS, {})
    return tables


def _trained_on_each(evaluations: Sequence[Evaluation]) -> Iterator[tuple[str, list[Evaluation]]]:
    own = [e for e in evaluations if _trained_on(e) == strategy_of(e)]
    return ((name, group) for name, group in group_by(own, _name) if _is_varied(group))


def _at_test_time(evaluations: Sequence[Evaluation]) -> Iterator[tuple[str, list[Evaluation]]]:
    """Yield each network with all its evaluations, if one is on text it was not trained on."""
    known = [e for e in evaluations if not e.card.get("run") or _trained_on(e)]
    for (name, _), group in group_by(known, lambda e: (_own_name(e), e.card.get("run"))):
        if _is_varied(group) and any(_trained_on(e) != strategy_of(e) for e in group):
            yield name, group


def _not_recorded(evaluations: Sequence[Evaluation]) -> Iterator[tuple[str, list[Evaluation]]]:
    unknown = [e for e in evaluations if e.card.get("run") and not _trained_on(e)]
    return ((name, group) for name, group in group_by(unknown, _name) if _is_varied(group))


def _linearizations(
    title: str, group: Sequence[Evaluation], paper: Mapping[str, PaperScores], note: str = ""
) -> list[Table]:
    return _variants(title, group, strategy_of, STRATEGIES, paper, [note] if note else [])


def _trained_on(evaluation: Evaluation) -> str | None:
    """Return the linearization that a run was trained on; None if it is no run or not recorded."""
    strategy = (evaluation.card.get("trained_text") or {}).get("strategy")
    return str(strategy) if evaluation.card.get("run") and strategy else None


def _is_varied(group: Sequence[Evaluation]) -> bool:
    return len({strategy_of(e) for e in group}) > 1


def _name(evaluation: Evaluation) -> str:
    return _on_corpus(paper_row(evaluation.card, strategy_of(evaluation)), evaluation)


def _own_name(evaluation: Evaluation) -> str:
    return _on_corpus(own_name(evaluation.card), evaluation)


def _on_corpus(name: str, evaluation: Evaluation) -> str:
    return f"{name} on {corpus_title(str(evaluation.card.get('corpus')))}"


def _variants(
    title: str,
    group: Sequence[Evaluation],
    variant: Callable[[Evaluation], str],
    order: Sequence[str],
    paper: Mapping[str, PaperScores],
    notes: Sequence[str] = (),
) -> list[Table]:
    """Make a row for each variant of one system, in one table per metric."""
    parts = group_by_metric(group)
    tables = []
    for part in parts:
        chosen = sorted(part, key=lambda e: place(variant(e), order))
        headings = disambiguate([variant(e) for e in chosen], chosen)
        is_papers = bool(paper) and all(_is_of_table_3(e) for e in chosen)
        rows = [
            score_row(
                heading,
                evaluation,
                paper.get(variant(evaluation), NO_PAPER) if is_papers else NO_PAPER,
                paper_words("table3", variant(evaluation)) if is_papers else "",
            )
            for heading, evaluation in zip(headings, chosen, strict=True)
        ]
        notes_shown = (
            []
            if part is parts[0]
            else [f"Not comparable with the first table: {incompatibility_reason(part, parts[0])}."]
        )
        notes_shown += [*notes, *(paper_notes("table3") if is_papers else ())]
        tables.append(score_table(title + (" (Table 3)" if is_papers else ""), rows, notes_shown))
    return tables


def _is_of_table_3(evaluation: Evaluation) -> bool:
    row = matching_row(evaluation.card, strategy_of(evaluation))
    return row == SYSTEM_OF_TABLE_3 and evaluation.card.get("corpus") == "photochat"
