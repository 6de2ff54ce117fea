"""The page of a corpus: the survey of `d2i corpus`, in numbers alone.

Counts, lengths, record issues, damaged images, leaks between splits and how to exclude them.
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from os import PathLike, fspath
from typing import Any

from d2i.io import storage
from d2i.report.document import OmittedSection, Section, render_page, tables_section
from d2i.report.lengths import lengths_section
from d2i.report.table import Cell, Row, Table, count_cells, reason_rows
from d2i.report.variants import meanings, variants_section

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
Splits = Mapping[str, Mapping[str, Any]]
_LEAKS_TITLE = "Leaks between splits"
# A share below this one would be shown as 0.0 %.
_LEAST_SHARE = 0.0005
_ARROW = "\N{RIGHTWARDS ARROW}"


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
    return render_page(
        "corpus.html",
        f"{survey['corpus']} corpus: {survey['source']}",
        sections,
        totals={name: sum(found[name] for found in splits.values()) for name, _, _ in _ROWS},
        licence=survey["licence"],
        instances=[(split, found["num_instances"], ",") for split, found in splits.items()],
        too_long=[
            (split, found["lengths"]["share_over"], ".1%")
            for split, found in splits.items()
            if found["lengths"]["share_over"] is not None
        ],
        rooms=sorted({found["lengths"]["room"] for found in splits.values()}),
        leaks=_leaks_card(survey),
    )


def _leaks_card(survey: Mapping[str, Any]) -> dict[str, Any] | None:
    leaks = survey["leaks"]
    if len(survey["splits"]) < 2 and not leaks["counts"]:
        return None
    values = [(name, number, ",") for name, number in named_leaks(leaks["counts"])]
    return {"values": values or [("between splits", "none", "")], "near": leaks["near"]}


def _counts_section(splits: Splits) -> Section | OmittedSection:
    rows = [Row(name, _cells(field, splits), note=meaning) for field, name, meaning in _ROWS]
    tables = [Table("", _columns(splits), tuple(rows))]
    return tables_section("counts", "Counts", tables, omitted="the corpus has no split")


def _cells(field: str, splits: Splits) -> tuple[Cell, ...]:
    cells = count_cells(found[field] for found in splits.values())
    if field == "num_images" and len(splits) > 1:
        # A sum would count an image that two splits share twice.
        return (*cells[:-1], Cell(blank="not counted"))
    return cells


def problems_section(splits: Splits) -> Section | OmittedSection:
    """Count record issues by reason, with the first case of each."""
    title = "Record issues"
    first: dict[str, Mapping[str, str]] = {}
    for found in splits.values():
        for reason, case in found["first_problems"].items():
            first.setdefault(reason, case)

    def heading(reason: str) -> tuple[str, str]:
        name, note = _heading(reason, "record_issues")
        case = first.get(reason)
        return name, f"{note} (first: {case['where']}: {case['detail']})" if case else note

    rows = reason_rows([found["problems"] for found in splits.values()], heading)
    intro = (
        "Broken records are skipped and counted by reason, and never repaired silently. Each "
        "reason names its first case."
    )
    tables = [Table("", _columns(splits), tuple(rows))]
    return tables_section("problems", title, tables, intro=intro, omitted="no record has an issue")


def images_section(splits: Splits) -> Section | OmittedSection:
    """Count the image files that can be read, and by reason those that cannot."""
    title = "Image files"
    looked = {split: found["pictures"] for split, found in splits.items() if found["pictures"]}
    if not looked:
        return OmittedSection(title, "the image files were not opened")
    rows = [
        Row(
            "Read",
            count_cells(found["num_read"] for found in looked.values()),
            note="the file exists and is a complete image",
        ),
        *reason_rows(
            [found["failures"] for found in looked.values()],
            lambda reason: _heading(reason, "image_failures"),
        ),
    ]
    others = ", ".join(split for split in splits if split not in looked)
    rest = f" Those of {others} were not opened." if others else ""
    intro = f"Every distinct image file of a split was opened once.{rest}"
    tables = [Table("", _columns(looked), tuple(rows))]
    return tables_section("images", title, tables, intro=intro)


def _columns(splits: Mapping[str, Any]) -> tuple[str, ...]:
    return (*splits, *(["all"] if len(splits) > 1 else []))


def _heading(reason: str, kind: str) -> tuple[str, str]:
    return reason.replace("_", " ").capitalize(), meanings(kind).get(reason, "")


def named_leaks(counts: Sequence[Mapping[str, Any]]) -> list[tuple[str, int]]:
    """Name each pair of splits that leaks, with its number of instances over all reasons."""
    pairs: Counter[str] = Counter()
    for count in counts:
        pairs[f"{count['split']} {_ARROW} {count['other_split']}"] += count["num_instances"]
    return list(pairs.items())


def leaks_section(survey: Mapping[str, Any]) -> Section | OmittedSection:
    """Show the leaks found, the searches not made, and how to exclude the leaks."""
    splits, leaks = survey["splits"], survey["leaks"]
    if len(splits) < 2 and not leaks["counts"]:
        return OmittedSection(_LEAKS_TITLE, "the corpus has fewer than two splits")
    largest_first = sorted(leaks["counts"], key=lambda count: -count["num_instances"])
    values = {
        "near": leaks["near"],
        "findings": [(count, _share(count, splits)) for count in largest_first],
        "corpus": shlex.join(
            ["--corpus", str(survey["corpus"]), "--source", str(survey["source"])]
        ),
    }
    return Section("leaks", _LEAKS_TITLE, "leaks.html", values)


def _share(count: Mapping[str, Any], splits: Splits) -> float | None:
    """Return the share of a split that leaks, if it is not shown as 0.0 %."""
    of_all = splits.get(count["split"], {}).get("num_instances", 0)
    share = count["num_instances"] / of_all if of_all else 0.0
    return share if share >= _LEAST_SHARE else None
