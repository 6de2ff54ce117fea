"""People, food and animals (the paper's Figure 5): 50 conversations each, by PhotoChat's labels.

The labels are classes of Open Images. Each list of `categories.json` (ours: the paper names none)
holds the classes of a branch of its hierarchy, with the parts of a person for people and the drinks
for food, under Open Images' newer names ("Human face", "Dairy Product") and under the words that
PhotoChat writes ("Face", "Dairy"): the older names, without "Human" but for "Human body".
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from d2i import storage
from d2i.dialog import key_order_hash
from d2i.report.comparable import card_summary, group_by_metric, is_plain, why_apart
from d2i.report.evaluation import Evaluation, tell_apart
from d2i.report.paper import paper_row
from d2i.report.tabulated import Cell, Row, Table
from d2i.shards import ShardReader

NUM_OF_CATEGORY = 50
_Z_95 = 1.959963984540054


@dataclass(frozen=True)
class Category:
    """One category: its name, how many instances have its labels, and the keys drawn of them."""

    name: str
    num_instances: int
    keys: tuple[str, ...]


@cache
def read_classes() -> dict[str, frozenset[str]]:
    """Return the classes of each category."""
    content = files("d2i.report").joinpath("categories.json").read_text(encoding="utf-8")
    return {name: frozenset(classes) for name, classes in json.loads(content).items()}


def draw_categories(data_url: str) -> list[Category]:
    """Draw at most 50 instances a category, by the hash of their keys; those without are left out.

    Raises:
        ShardError: If the data set cannot be read.
    """
    reader = ShardReader(data_url)
    labels = {
        key: frozenset(reader.read_json(place).get("labels") or ())
        for place, key in enumerate(reader.keys)
    }
    found = []
    for name, classes in read_classes().items():
        keys = sorted(
            (key for key, given in labels.items() if given & classes),
            key=lambda key: key_order_hash(key, 0),
        )
        if keys:
            found.append(Category(name, len(keys), tuple(keys[:NUM_OF_CATEGORY])))
    return found


def labelled(evaluations: Sequence[Evaluation]) -> list[Evaluation]:
    """Return the evaluations of which the categories are shown, one a system."""
    return [e for e in evaluations if e.card.get("corpus") == "photochat" and is_plain(e)]


def figure5(evaluations: Sequence[Evaluation]) -> list[Table]:
    """Mean CLIP-I of each system within each category; what cannot be compared stands apart.

    Raises:
        ShardError: If the data set cannot be read.
    """
    parts = group_by_metric(labelled(evaluations))
    return [
        _table(part, categories, "" if part is parts[0] else why_apart(part, parts[0]))
        for part in parts
        if (categories := draw_categories(str(part[0].card.get("data"))))
    ]


def _table(part: Sequence[Evaluation], categories: Sequence[Category], apart: str) -> Table:
    headings = tell_apart([paper_row(evaluation.card) for evaluation in part], part)
    rows = []
    for heading, evaluation in zip(headings, part, strict=True):
        by_key = read_instances(evaluation)
        cells = tuple(_mean(by_key, category.keys) for category in categories)
        rows.append(Row(heading, cells, card_summary(evaluation)))
    columns = tuple(f"{c.name}: {len(c.keys)} of {c.num_instances}" for c in categories)
    notes = [f"Kept apart, as not comparable: {apart}."] if apart else []
    notes.append("CLIP-I; the range is the mean's 95 % confidence, from its pictures' deviation.")
    title = "CLIP-I by category (Figure 5)" + (", apart" if apart else "")
    return Table(title, columns, tuple(rows), tuple(notes))


def read_instances(evaluation: Evaluation) -> dict[str, dict[str, Any]]:
    """Read the row of each instance by key; empty where the evaluation kept none."""
    try:
        data = storage.read_bytes(storage.join(evaluation.url, "instances.jsonl"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    rows = map(json.loads, data.decode().splitlines())
    return {row["key"]: row for row in rows}


def _mean(by_key: Mapping[str, Mapping[str, Any]], keys: Collection[str]) -> Cell:
    values = [by_key[key]["clip_i"] for key in keys if "clip_i" in by_key.get(key, {})]
    if not values:
        return Cell()
    mean = sum(values) / len(values)
    if len(values) == 1:
        return Cell(mean)
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))
    return Cell(mean, interval=(mean - _Z_95 * deviation, mean + _Z_95 * deviation))
