"""Scores by category: people, food and animals (the paper's Figure 5)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from d2i.corpora import has_categories
from d2i.io import storage
from d2i.metric_specs import METRICS
from d2i.report.comparable import card_summary, group_by_metric, incompatibility_reason, is_plain
from d2i.report.evaluation import Evaluation, disambiguate, read_json
from d2i.report.paper_rows import paper_row
from d2i.report.table import Cell, Row, Table

_SHOWN = tuple(METRICS[key] for key in ("fid", "is", "kid_paired", "clip_i"))
_SCORES = (
    "FID and IS are the mean ± standard deviation over {num_draws} seeded draws of {draw_size} "
    "images; a category with at most that many is scored once, on all of them. The deviation is "
    "the variation between draws, not a confidence interval. KID and CLIP-I are over all images of "
    "the category; the range is the 95 % BCa interval of the mean CLIP-I."
)
_RANK = (
    "Not comparable between categories. The covariance behind FID on 50 images in 2,048 dimensions "
    "has rank 49: compare FID only on the same number of images."
)


def labelled(evaluations: Sequence[Evaluation]) -> list[Evaluation]:
    """Return the evaluations whose categories are shown: plain ones of a corpus that has any."""
    return [e for e in evaluations if has_categories(e.card.get("corpus")) and is_plain(e)]


def read_categories(evaluation: Evaluation) -> dict[str, Any] | None:
    """Read `categories.json` of an evaluation; None if it does not exist.

    Raises:
        DataError: If the file is not a JSON object.
    """
    return read_json(storage.join(evaluation.url, "categories.json"))


def figure5(evaluations: Sequence[Evaluation]) -> list[Table]:
    """Return FID, IS, KID and CLIP-I of each system within each category, one table per category.

    Scores that are not comparable get separate tables; evaluations without `categories.json` are
    left out.

    Raises:
        DataError: If a `categories.json` is not a JSON object.
    """
    documents = {e.url: read_categories(e) for e in labelled(evaluations)}
    found = {url: document for url, document in documents.items() if document}
    parts = group_by_metric([e for e in labelled(evaluations) if e.url in found])
    missing = [url for url, document in documents.items() if not document]
    return [
        table
        for part in parts
        for table in _tables(
            part, found, "" if part is parts[0] else incompatibility_reason(part, parts[0]), missing
        )
    ]


def _tables(
    part: Sequence[Evaluation],
    documents: Mapping[str, Mapping[str, Any]],
    apart: str,
    missing: Sequence[str],
) -> Iterator[Table]:
    """Yield one table per category; the first carries the notes on all of them."""
    notes = [f"Not comparable with the first table: {apart}."] if apart else []
    notes += _notes(documents[part[0].url])
    if missing and not apart:
        notes.append(f"No categories.json (eval/figure5.py writes it) in: {', '.join(missing)}.")
    headings = disambiguate([paper_row(evaluation.card) for evaluation in part], part)
    for of_first in documents[part[0].url]["categories"]:
        name = of_first["name"]
        rows = [
            Row(heading, _cells(_scores_of(documents[e.url], name)), card_summary(e))
            for heading, e in zip(headings, part, strict=True)
        ]
        title = f"{name.capitalize()}: {of_first['num_instances']} instances (Figure 5)"
        columns = ("images", *(metric.title for metric in _SHOWN))
        yield Table(
            title + (", not comparable" if apart else ""), columns, tuple(rows), tuple(notes)
        )
        notes = []


def _notes(document: Mapping[str, Any]) -> list[str]:
    draws = {"num_draws": document["num_draws"], "draw_size": document["draw_size"]}
    number = document["num_in_two"]
    counted_instances = "1 instance is" if number == 1 else f"{number} instances are"
    few = [
        f"{scores['name']} ({scores['num_instances']})"
        for scores in document["categories"]
        if scores["num_instances"] < document["draw_size"]
    ]
    notes = [
        _SCORES.format(**draws),
        _RANK,
        f"{counted_instances} in two or more categories and scored in each of them.",
    ]
    if few:
        notes.append(
            f"Categories with fewer than {document['draw_size']} instances, all of them used: "
            f"{', '.join(few)}."
        )
    return notes


def _scores_of(document: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    return next((s for s in document["categories"] if s["name"] == name), {})


def _cells(scores: Mapping[str, Any]) -> tuple[Cell, ...]:
    if not scores:
        return (Cell(),) * (1 + len(_SHOWN))
    num_generated, num_instances = scores["num_pictures"], scores["num_instances"]
    shown = [
        Cell(
            num_generated
            if num_generated == num_instances
            else f"{num_generated} of {num_instances}",
            spec="d",
        )
    ]
    for metric in _SHOWN:
        interval = scores.get(f"{metric.key}_interval")
        shown.append(
            Cell(
                scores.get(metric.key),
                metric.spec,
                std=scores.get(f"{metric.key}_std"),
                interval=(interval[0], interval[1]) if interval else None,
            )
        )
    return tuple(shown)
