"""Which scores may stand in one column: what decides a metric, whatever the system does."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from d2i.report.evaluation import Evaluation, lossy_codec

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
    """Say whether a system was shown the whole dialog, linearized as the paper's own systems."""
    return context_of(evaluation) == "full" and strategy_of(evaluation) == "hash"


def context_of(evaluation: Evaluation) -> str:
    """Return what of the dialog the system was shown."""
    return str(evaluation.card.get("context", "full"))


def strategy_of(evaluation: Evaluation) -> str:
    """Return how the dialog was linearized."""
    return str((evaluation.card.get("text") or {}).get("strategy", "hash"))


def metric_identity(card: Mapping[str, Any]) -> dict[str, Any]:
    """Return what decides the metric. How a system samples is the system's own affair."""
    clip_image = (card.get("weights") or {}).get("clip_image")
    fields = {name: card.get(name) for name in _METRIC_FIELDS}
    return fields | {"codec": lossy_codec(card), "clip_image": clip_image}


def group_by_metric(evaluations: Sequence[Evaluation]) -> list[list[Evaluation]]:
    """Put those together whose metric is the same; the largest group first."""
    groups: dict[str, list[Evaluation]] = {}
    for evaluation in evaluations:
        identity = json.dumps(metric_identity(evaluation.card), sort_keys=True, default=str)
        groups.setdefault(identity, []).append(evaluation)
    return sorted(groups.values(), key=len, reverse=True)


def why_apart(group: Sequence[Evaluation], first: Sequence[Evaluation]) -> str:
    """Say in what a group's metric differs from that of the first."""
    theirs, ours = metric_identity(group[0].card), metric_identity(first[0].card)
    named = [
        f"{name} {_short(theirs[name])} instead of {_short(ours[name])}"
        for name in theirs
        if theirs[name] != ours[name]
    ]
    return "; ".join(named)


def card_summary(evaluation: Evaluation) -> str:
    """Write what matters most of a metric card, for whoever points at a number."""
    card = evaluation.card
    sampling = (
        f"{card['sampler']} {card['num_steps']} steps, guidance {card['guidance_scale']}"
        if card.get("sampler")
        else "its own sampling"
    )
    return (
        f"{evaluation.label}: {card.get('found')} of {card.get('expected')} instances; "
        f"extractor {card.get('extractor')}; measured at {card.get('resolution')} px, "
        f"{card.get('resize')}; {card.get('codec')}; {sampling}; seed {card.get('seed')}; "
        f"context {card.get('context')}; {evaluation.url}"
    )


def _short(value: Any) -> str:
    if value is None:
        return "not named"
    said = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return said if len(said) <= 60 else f"{said[:57]}…"
