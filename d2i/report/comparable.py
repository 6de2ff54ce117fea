"""Comparability of scores: the fields of a metric card that define the metric, not the system."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from d2i.metric_specs import METRICS
from d2i.report.evaluation import Evaluation, lossy_codec
from d2i.report.paper_rows import row_mismatches

KeyT = TypeVar("KeyT", bound=Hashable)

_METRIC_FIELDS = (
    "instances_sha256",
    "expected",
    "extractor",
    "clip_text",
    "negatives",
    "resolution",
    "resize",
    "device",
    "versions",
)


def is_plain(evaluation: Evaluation) -> bool:
    """Return whether a system got the whole dialog, linearized as for the paper's own systems."""
    return context_of(evaluation) == "full" and strategy_of(evaluation) == "hash"


def context_of(evaluation: Evaluation) -> str:
    """Return the part of the dialog that the system got, a value of `--context`."""
    return str(evaluation.card.get("context", "full"))


def strategy_of(evaluation: Evaluation) -> str:
    """Return the linearization of the dialog."""
    return str((evaluation.card.get("text") or {}).get("strategy", "hash"))


def metric_identity(card: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that define the metric; how a system samples is not one of them."""
    clip_image = (card.get("weights") or {}).get("clip_image")
    fields = {name: card.get(name) for name in _METRIC_FIELDS}
    return fields | {"codec": lossy_codec(card), "clip_image": clip_image}


def place(name: str, order: Sequence[str]) -> int:
    """Return the position of a name in an order; names that are not in it come last."""
    return order.index(name) if name in order else len(order)


def group_by(
    evaluations: Sequence[Evaluation], key: Callable[[Evaluation], KeyT]
) -> Iterator[tuple[KeyT, list[Evaluation]]]:
    """Group evaluations, in order of appearance."""
    groups: dict[KeyT, list[Evaluation]] = {}
    for evaluation in evaluations:
        groups.setdefault(key(evaluation), []).append(evaluation)
    yield from groups.items()


def guidance_words(card: Mapping[str, Any]) -> str | None:
    """Describe the guidance scale and its origin: `3 (d2i select, FID on 9 validation dialogs)`."""
    scale = card.get("guidance_scale")
    if scale is None:
        return None
    chosen = card.get("guidance_chosen_by") or {}
    how = chosen.get("how")
    if how == "select":
        metric = METRICS.get(str(chosen.get("metric")))
        said = metric.title if metric else chosen.get("metric")
        how = f"d2i select, {said} on {chosen.get('num_instances')} validation dialogs"
    elif how == "recipe":
        how = "recipe"
    return f"{scale:g} ({how})" if how else f"{scale:g}"


def group_by_metric(evaluations: Sequence[Evaluation]) -> list[list[Evaluation]]:
    """Group evaluations whose metric is the same; the largest group comes first."""
    groups: dict[str, list[Evaluation]] = {}
    for evaluation in evaluations:
        identity = json.dumps(metric_identity(evaluation.card), sort_keys=True, default=str)
        groups.setdefault(identity, []).append(evaluation)
    return sorted(groups.values(), key=len, reverse=True)


def incompatibility_reason(group: Sequence[Evaluation], first: Sequence[Evaluation]) -> str:
    """Describe how a group's metric differs from that of the first group."""
    theirs, ours = metric_identity(group[0].card), metric_identity(first[0].card)
    named = [
        f"{name} {_short(theirs[name])} instead of {_short(ours[name])}"
        for name in theirs
        if theirs[name] != ours[name]
    ]
    return "; ".join(named)


def card_summary(evaluation: Evaluation) -> str:
    """Summarize a metric card in one line, for tooltips and CSV."""
    card = evaluation.card
    sampling = (
        f"{card['sampler']} {card['num_steps']} steps, guidance {guidance_words(card)}"
        if card.get("sampler")
        else "its own sampling"
    )
    return (
        f"{evaluation.label}: {card.get('found')} of {card.get('expected')} instances; "
        f"extractor {card.get('extractor')}; measured at {card.get('resolution')} px, "
        f"{card.get('resize')}; {card.get('codec')}; {sampling}; seed {card.get('seed')}; "
        f"context {card.get('context')}; {evaluation.url}{_unearned(evaluation)}"
    )


def _unearned(evaluation: Evaluation) -> str:
    reasons = row_mismatches(evaluation.card, strategy_of(evaluation))
    return f"; not the paper's row: {'; '.join(reasons)}" if reasons else ""


def _short(value: Any) -> str:
    if value is None:
        return "not recorded"
    said = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return said if len(said) <= 60 else f"{said[:57]}…"
