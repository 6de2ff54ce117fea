"""Gain of fine-tuning: a run's scores minus those of the network that it started from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from d2i.metric_specs import PAPER_METRICS
from d2i.report.evaluation import Evaluation
from d2i.report.html import is_number
from d2i.report.paper_rows import PaperScores, paper_gain
from d2i.report.score_rows import Gains


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
    if not evaluation.card.get("run") or not evaluation.card.get("backbone"):
        return None
    found = [e for e in beside if _is_start(e, evaluation)]
    return found[0] if len(found) == 1 else None


def _is_start(before: Evaluation, after: Evaluation) -> bool:
    if before.card.get("run"):
        return False
    same = ("backbone", "changed_sizes", "text", "context")
    if any(before.card.get(name) != after.card.get(name) for name in same):
        return False
    start, own = (e.card.get("initial_weights") or {} for e in (before, after))
    if own.get("file") == "scratch":
        return False
    # Older cards do not record the hash.
    return "sha256" not in start or "sha256" not in own or start["sha256"] == own["sha256"]
