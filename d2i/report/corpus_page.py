"""The page of a corpus: the survey of `d2i corpus`, in numbers alone."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike, fspath
from typing import Any

from d2i.io import storage
from d2i.report.counts import count_cells
from d2i.report.document import render_document, render_header
from d2i.report.html import Section, card, counted, figure, percent, table, text
from d2i.report.leaks import leaks_section, named_leaks
from d2i.report.lengths import lengths_section
from d2i.report.record_issues import images_section, problems_section
from d2i.report.variants import variants_section

_ROWS = (
    ("num_dialogs", "Dialogs", "conversations that could be read"),
    ("num_dialogs_with_images", "Dialogs with an image", "only these give instances"),
    ("num_turns", "Turns", "messages of all dialogs: text, images or both"),
    ("num_occurrences", "Occurrences", "counts every time an image is shared"),
    ("num_images", "Distinct images", "each counted once per split; may be in several splits"),
    (
        "num_instances",
        "Instances",
        "one image with the text around it: a training or test example",
    ),
)


def write_corpus_report(survey: Mapping[str, Any], out_path: str | PathLike[str]) -> None:
    """Write the survey of a corpus as one self-contained HTML file.

    The page holds the figures and the settings of the survey, and no text or image of the corpus.
    The same survey gives the same bytes.

    Args:
        survey: The output of `d2i corpus --json`.
        out_path: Path or URL of the HTML file, which is published atomically.
    """
    storage.write_bytes(fspath(out_path), _page(survey).encode())


def _page(survey: Mapping[str, Any]) -> str:
    splits = survey["splits"]
    sections = [
        _counts_section(splits),
        lengths_section(splits, survey["text"]),
        variants_section(survey),
        leaks_section(survey),
        problems_section(splits),
        images_section(splits),
    ]
    title = f"{survey['corpus']} corpus: {survey['source']}"
    footer = (
        "All figures are from the survey; hover over a rounded figure for its exact value. "
        "This page has no text and no image of the corpus."
    )
    return render_document(title, _header(title, survey), sections, footer)


def _header(title: str, survey: Mapping[str, Any]) -> str:
    splits = survey["splits"].values()
    totals = {name: sum(found[name] for found in splits) for name, _, _ in _ROWS}
    heading = (
        f"{counted(totals['num_dialogs'], 'dialog')}, "
        f"images shared {counted(totals['num_occurrences'], 'time')}"
    )
    lead = (
        f"They give <strong>{counted(totals['num_instances'], 'instance')}</strong>. An instance "
        "is one image with the text around it: a training or test example. "
        "This page shows only numbers and settings, no text and no image of the corpus."
    )
    cards = [_instances_card(survey), _lengths_card(survey), _leaks_card(survey)]
    return render_header(title, heading, lead, "".join(cards))


def _instances_card(survey: Mapping[str, Any]) -> str:
    values = [
        (split, figure(found["num_instances"], ",")) for split, found in survey["splits"].items()
    ]
    return card("Instances", values, "per split of the corpus")


def _lengths_card(survey: Mapping[str, Any]) -> str:
    lengths = {split: found["lengths"] for split, found in survey["splits"].items()}
    values = [
        (split, percent(measured["share_over"]))
        for split, measured in lengths.items()
        if measured["share_over"] is not None
    ]
    rooms = sorted({measured["room"] for measured in lengths.values()})
    room = " or ".join(figure(tokens, ",") for tokens in rooms)
    note = f"exceed the limit of {room} tokens; measured on a sample of each split"
    return card("Contexts over the limit", values, note) if values else ""


def _leaks_card(survey: Mapping[str, Any]) -> str:
    leaks = survey["leaks"]
    if len(survey["splits"]) < 2 and not leaks["counts"]:
        return ""
    looked = "counted too" if leaks["near"] else "not searched for"
    note = f"have an image that is also in a held-out split; near-duplicates were {looked}"
    values = [(name, figure(number, ",")) for name, number in named_leaks(leaks["counts"])]
    return card("Leaked instances", values or [("between splits", "none")], note)


def _counts_section(splits: Mapping[str, Mapping[str, Any]]) -> Section:
    rows = [
        (f"{name}<small>{meaning}</small>", _cells(field, splits)) for field, name, meaning in _ROWS
    ]
    head = ["", *map(text, splits), *(["all"] if len(splits) > 1 else [])]
    return Section("counts", "Counts", table(head, rows))


def _cells(field: str, splits: Mapping[str, Mapping[str, Any]]) -> list[str]:
    cells = count_cells(found[field] for found in splits.values())
    if field == "num_images" and len(splits) > 1:
        # A sum would count an image that two splits share twice.
        cells[-1] = '<span class="absent">not counted</span>'
    return cells
