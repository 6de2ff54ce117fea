"""Attribute accuracy as bars, with chance and the reference images marked on the same scale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from d2i.report.document import OmittedSection, Section
from d2i.report.evaluation import Evaluation, column_names
from d2i.report.table import Cell, Row, Table, is_number, number_cell, without_blanks

_TITLE = "Attributes"
_MARKS = {
    "chance": "chance",
    "true": "reference images",
    "codec": "VAE reconstructions of reference images",
}
Judged = Sequence[tuple[str, Mapping[str, Any]]]


def attributes_section(evaluations: Sequence[Evaluation]) -> Section | OmittedSection:
    """Show how often each attribute was read correctly, for each system that was judged."""
    judged = [
        (name, evaluation.judged)
        for name, evaluation in zip(column_names(evaluations), evaluations, strict=True)
        if evaluation.judged and evaluation.judged.get("by_attribute")
    ]
    if not judged:
        return OmittedSection(_TITLE, "no judged.json: no attributes were read from these images")
    last = judged[-1][1]
    attributes = list(dict.fromkeys(a for _, answers in judged for a in answers["by_attribute"]))
    shares = [values for _, answers in judged for values in answers["by_attribute"].values()]
    accuracy = last.get("accuracy") or {}
    is_controlled = is_number(accuracy.get("shuffled")) and is_number(accuracy.get("chance"))
    values = {
        "judge": last.get("judge", ""),
        "num_images": last.get("num_images"),
        "control": accuracy if is_controlled else None,
        "systems": [name for name, _ in judged],
        "marks": {
            field: name
            for field, name in _MARKS.items()
            if any(is_number(values.get(field)) for values in shares)
        },
        "groups": [(attribute, _bars(attribute, judged)) for attribute in attributes],
        "table": without_blanks(_table(attributes, judged)),
    }
    return Section("attributes", _TITLE, "attributes.html", values)


def _bars(attribute: str, judged: Judged) -> list[dict[str, Any]]:
    """Return the share of each system, and the marks on its bar; the last system stands out."""
    found = [(name, answers["by_attribute"].get(attribute, {})) for name, answers in judged]
    return [
        {
            "system": name,
            "share": values["generated"],
            "marks": {field: values[field] for field in _MARKS if is_number(values.get(field))},
            "kind": "last" if name == judged[-1][0] else "earlier",
        }
        for name, values in found
        if is_number(values.get("generated"))
    ]


def _table(attributes: Sequence[str], judged: Judged) -> Table:
    columns = [column for name, _ in judged for column in (name, f"{name}, with shuffled dialogs")]
    columns += [_capitalised(mark) for mark in _MARKS.values()]
    rows = [
        Row(_capitalised(a), _cells([answers["by_attribute"].get(a, {}) for _, answers in judged]))
        for a in attributes
    ]
    for group in judged[-1][1].get("groups") or {}:
        means = [(answers.get("groups") or {}).get(group, {}) for _, answers in judged]
        rows.append(Row(f"All {group} attributes", _cells(means)))
    rows.append(Row("All", _cells([answers.get("accuracy", {}) for _, answers in judged])))
    return Table("", tuple(columns), tuple(rows), corner="Attribute")


def _cells(columns: Sequence[Mapping[str, Any]]) -> tuple[Cell, ...]:
    """Return each system's accuracy and its control, then the marks, which are the same for all."""
    found = [values.get(field) for values in columns for field in ("generated", "shuffled")]
    found += [columns[-1].get(field) for field in _MARKS]
    return tuple(number_cell(share, ".1%", "\N{EN DASH}") for share in found)


def _capitalised(label: str) -> str:
    return label[:1].upper() + label[1:]
