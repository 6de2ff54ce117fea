"""The scores side by side, each with the fields that decide it."""

from __future__ import annotations

from collections.abc import Sequence

from d2i.metric_specs import METRICS, MetricSpec
from d2i.report.evaluation import (
    MAX_NAMED,
    Evaluation,
    column_names,
    differing_fields,
    group_comparable,
)
from d2i.report.html import Section, figure, is_number, percent, table, text

_CARD_FIELDS = {
    "extractor": "Feature extractor",
    "expected": "Images expected",
    "found": "Images scored",
    "weights_kind": "Weights of the run",
    "sampler": "Sampler",
    "num_steps": "Sampling steps",
    "guidance_scale": "Guidance scale",
    "precision": "Precision of the network",
    "seed": "Seed",
    "compute_batch_size": "Compute batch",
    "device": "Device",
    "context": "Context",
}


def scores_section(evaluations: Sequence[Evaluation]) -> Section:
    """Show scores whose cards agree in one table, and others in separate tables."""
    groups = group_comparable(evaluations)
    names = column_names(evaluations)
    apart = ""
    if len(groups) > 1:
        fields = ", ".join(text(field) for field in differing_fields(evaluations))
        apart = (
            '<p class="warning">Not comparable, so shown in separate tables: they differ in '
            f"{fields}.</p>"
        )
    tables = (
        _scores_table([evaluations[n] for n in group], [names[n] for n in group])
        for group in groups
    )
    return Section("scores", "Scores", apart + "".join(tables) + _warned(evaluations, names))


def _warned(evaluations: Sequence[Evaluation], names: Sequence[str]) -> str:
    """Show each warning once, with the systems that it applies to."""
    of: dict[str, list[str]] = {}
    for name, evaluation in zip(names, evaluations, strict=True):
        for warning in evaluation.warnings:
            of.setdefault(warning, []).append(name)
    return "".join(
        f'<p class="warning">{text(_listed(warned))}: {text(warning)}.</p>'
        for warning, warned in of.items()
    )


def _listed(names: Sequence[str]) -> str:
    if len(names) <= MAX_NAMED:
        return ", ".join(names)
    return f"{', '.join(names[:MAX_NAMED])} and {len(names) - MAX_NAMED} more"


def _scores_table(evaluations: Sequence[Evaluation], names: Sequence[str]) -> str:
    card = evaluations[0].card
    extractor, found = text(card.get("extractor", "not recorded")), card.get("found")
    images = f", {figure(found, ',')} images" if is_number(found) else ""
    rows = [
        (f"{metric.long_title} {_direction(metric)}", [_score(e, metric) for e in evaluations])
        for metric in METRICS.values()
        if metric.on_page
    ]
    if any(evaluation.judged for evaluation in evaluations):
        rows.append(
            ("Attribute accuracy <small>higher is better</small>", _accuracies(evaluations))
        )
    head = ["Score", *(text(name) for name in names)]
    caption = f"FID on {extractor}{images}"
    is_wide = len(evaluations) > MAX_NAMED
    return (
        _turned(head, rows, caption) if is_wide else table(head, rows, caption)
    ) + f"<details><summary>Metric card</summary>{_card_table(evaluations, names)}</details>"


def _turned(head: Sequence[str], rows: Sequence[tuple[str, list[str]]], caption: str) -> str:
    """Render a table with its columns as rows, for more systems than fit the page's width."""
    headings, cells = zip(*rows, strict=True)
    columns = zip(head[1:], zip(*cells, strict=True), strict=True)
    return f'<div class="turned">{table(["System", *headings], columns, caption)}</div>'


def _direction(metric: MetricSpec) -> str:
    # The caption names the extractor for FID.
    on_extractor = (
        ", on the same extractor" if metric.is_on_extractor and metric.key != "fid" else ""
    )
    return f"<small>{metric.direction}{on_extractor}</small>"


def _score(evaluation: Evaluation, metric: MetricSpec) -> str:
    value = evaluation.scores.get(metric.key)
    if not is_number(value):
        return '<span class="absent">not scored</span>'
    std = evaluation.scores.get(metric.std_key) if metric.std_key else None
    deviation = f" <small>± {figure(std, metric.spec)}</small>" if is_number(std) else ""
    interval = _interval(evaluation.intervals.get(metric.key), metric.spec)
    return figure(value, metric.spec) + deviation + interval


def _interval(interval: Sequence[float] | None, spec: str) -> str:
    if interval is None:
        return ""
    low, high = (figure(end, spec) for end in interval)
    return f" <small>{low} to {high}</small>"


def _accuracies(evaluations: Sequence[Evaluation]) -> list[str]:
    shares = [((e.judged or {}).get("accuracy") or {}).get("generated") for e in evaluations]
    return [
        percent(share) if is_number(share) else '<span class="absent">not judged</span>'
        for share in shares
    ]


def _card_table(evaluations: Sequence[Evaluation], names: Sequence[str]) -> str:
    rows = [
        (title, [text(evaluation.card.get(field, "not recorded")) for evaluation in evaluations])
        for field, title in _CARD_FIELDS.items()
    ]
    rows.insert(0, ("System", [text(evaluation.label) for evaluation in evaluations]))
    return table(["", *(text(name) for name in names)], rows)
