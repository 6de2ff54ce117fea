"""The top of the page: one sentence and the headline numbers."""

from __future__ import annotations

from collections.abc import Sequence

from d2i.metric_specs import METRICS
from d2i.report.document import render_header
from d2i.report.evaluation import MAX_NAMED, Evaluation, column_names, group_comparable
from d2i.report.html import card, figure, is_number, percent, text

DEFAULT_TITLE = "d2i report"
_SENTENCE = "From a conversation to the image that answers it"


def page_header(evaluations: Sequence[Evaluation], title: str | None) -> str:
    """Render the heading, the evaluated systems, and up to three headline numbers."""
    cards = (
        [_accuracy(evaluations), _score(evaluations, "fid"), _score(evaluations, "clip_i")]
        if len(evaluations) <= MAX_NAMED
        else []
    )
    return render_header(title or DEFAULT_TITLE, _SENTENCE, _sentence(evaluations), "".join(cards))


def _sentence(evaluations: Sequence[Evaluation]) -> str:
    card = evaluations[-1].card
    found, data = card.get("found"), str(card.get("data", "")).rstrip("/")
    count = f"{figure(found, ',')} conversations" if is_number(found) else "conversations"
    split = f" of the {text(data.rpartition('/')[2])} split" if data else ""
    if len(evaluations) > MAX_NAMED:
        return f"{figure(len(evaluations), ',')} evaluations side by side."
    labels = [f"<strong>{text(evaluation.label)}</strong>" for evaluation in evaluations]
    systems = " and ".join(filter(None, [", then ".join(labels[:-1]), labels[-1]]))
    return f"Images generated for {count}{split} by {systems}."


def _accuracy(evaluations: Sequence[Evaluation]) -> str:
    accuracies = [(evaluation.judged or {}).get("accuracy") for evaluation in evaluations]
    if not all(accuracies):
        return ""
    shares = [accuracy["generated"] for accuracy in accuracies if accuracy]
    last = accuracies[-1] or {}
    beside = [
        f"{name} {percent(last[field])}"
        for field, name in (("true", "reference images"), ("chance", "chance"))
        if is_number(last.get(field))
    ]
    beside += [
        f"{text(group)} only {percent(means['generated'])}"
        for group, means in ((evaluations[-1].judged or {}).get("groups") or {}).items()
    ]
    note = f"read from the pixels by a rule; {', '.join(beside)}"
    return _card("Attribute accuracy", [percent(share) for share in shares], evaluations, note)


def _score(evaluations: Sequence[Evaluation], name: str) -> str:
    values = [evaluation.scores.get(name) for evaluation in evaluations]
    if len(group_comparable(evaluations)) > 1 or not all(is_number(value) for value in values):
        return ""
    metric = METRICS[name]
    extractor = evaluations[0].card.get("extractor", "?")
    beside = f"on {text(extractor)}" if metric.is_on_extractor else metric.note
    note = f"{metric.direction}; {beside}"
    shown = [figure(v, metric.spec) for v in values if v is not None]
    return _card(metric.title, shown, evaluations, note)


def _card(title: str, values: list[str], evaluations: Sequence[Evaluation], note: str) -> str:
    named = list(zip(column_names(evaluations), values, strict=True))
    return card(title, named, note, is_sequence=True)
