"""Attribute accuracy as bars, with chance and the reference images marked on the same scale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from d2i.report.evaluation import Evaluation, column_names
from d2i.report.html import OmittedSection, Section, capitalised, is_number, percent, table, text

_TITLE = "Attributes"
_SHUFFLED = "with shuffled dialogs"
_MARKS = {
    "chance": "chance",
    "true": "reference images",
    "codec": "VAE reconstructions of reference images",
}


def attributes_section(evaluations: Sequence[Evaluation]) -> Section | OmittedSection:
    """Show how often each attribute was read correctly, for each system that was judged."""
    judged = [
        (name, evaluation.judged)
        for name, evaluation in zip(column_names(evaluations), evaluations, strict=True)
        if evaluation.judged and evaluation.judged.get("by_attribute")
    ]
    if not judged:
        return OmittedSection(_TITLE, "no judged.json: no attributes were read from these images")
    attributes = list(dict.fromkeys(a for _, answers in judged for a in answers["by_attribute"]))
    groups = "".join(_group(attribute, judged) for attribute in attributes)
    body = (
        f'<p class="intro">{_intro(judged[-1][1])}</p>{_legend(judged)}'
        f'<div class="bars">{groups}</div>'
        f"<details><summary>As a table</summary>{_table(attributes, judged)}</details>"
    )
    return Section("attributes", _TITLE, body)


def _intro(judged: Mapping[str, Any]) -> str:
    count = judged.get("num_images")
    over = f" Over {count:,} images." if isinstance(count, int) else ""
    return f"{text(judged.get('judge', ''))}{over}{_control(judged)}"


def _control(judged: Mapping[str, Any]) -> str:
    """Describe the shuffled control: accuracy above chance should come from the dialog alone."""
    accuracy = judged.get("accuracy") or {}
    if not is_number(accuracy.get("shuffled")) or not is_number(accuracy.get("chance")):
        return ""
    return (
        f" Control: the same images {_SHUFFLED} reach {percent(accuracy['shuffled'])}; chance, "
        f"the reference images of other dialogs, is {percent(accuracy['chance'])}."
    )


def _legend(judged: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    systems = "".join(
        f'<li><i class="swatch {_series(n, judged)}"></i>{text(name)}</li>'
        for n, (name, _) in enumerate(judged)
    )
    shares = [values for _, answers in judged for values in answers["by_attribute"].values()]
    marks = "".join(
        f'<li><i class="swatch mark {field}"></i>{name}</li>'
        for field, name in _MARKS.items()
        if any(is_number(values.get(field)) for values in shares)
    )
    return f'<ul class="legend">{systems}{marks}</ul>'


def _group(attribute: str, judged: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    rows = "".join(
        _bar(name, answers["by_attribute"].get(attribute, {}), _series(n, judged))
        for n, (name, answers) in enumerate(judged)
    )
    return f'<div class="bar-group"><h3>{capitalised(attribute)}</h3><div>{rows}</div></div>'


def _bar(name: str, values: Mapping[str, Any], series: str) -> str:
    share = values.get("generated")
    if not is_number(share):
        return ""
    marks = "".join(
        f'<i class="mark {field}" style="left:{_clamped(values[field])}%"></i>'
        for field in _MARKS
        if is_number(values.get(field))
    )
    return (
        f'<div class="bar-row"><span class="hidden">{text(name)}</span><div class="track" '
        f'aria-hidden="true"><i class="bar {series}" style="width:{_clamped(share)}%"></i>'
        f'{marks}</div><span class="amount">{percent(share)}</span></div>'
    )


def _clamped(share: float) -> str:
    return f"{100 * min(1.0, max(0.0, share)):.2f}"


def _series(number: int, judged: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """Return the CSS class of a system's bars: only the last one has the accent colour."""
    return "last" if number == len(judged) - 1 else "earlier"


def _table(attributes: Sequence[str], judged: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    head = ["Attribute"]
    for name, _ in judged:
        head += [text(name), f"{text(name)}, {_SHUFFLED}"]
    head += [capitalised(mark) for mark in _MARKS.values()]
    last = judged[-1][1]
    rows = [
        (capitalised(a), _cells([answers["by_attribute"].get(a, {}) for _, answers in judged]))
        for a in attributes
    ]
    for group in last.get("groups") or {}:
        means = [(answers.get("groups") or {}).get(group, {}) for _, answers in judged]
        rows.append((f"All {text(group)} attributes", _cells(means)))
    rows.append(("All", _cells([answers.get("accuracy", {}) for _, answers in judged])))
    return table(head, rows)


def _cells(columns: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return each system's accuracy and its control, then the marks, which are the same for all."""
    cells = [_cell(values, field) for values in columns for field in ("generated", "shuffled")]
    return cells + [_cell(columns[-1], field) for field in _MARKS]


def _cell(values: Mapping[str, Any], field: str) -> str:
    share = values.get(field)
    return percent(share) if is_number(share) else "\N{EN DASH}"
