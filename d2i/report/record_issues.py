"""Record issues of a corpus, and image files that cannot be read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from d2i.report.counts import count_cells, reason_rows
from d2i.report.html import OmittedSection, Section, capitalised, table, text

_PROBLEMS = {
    "bad_image_ref": "where the picture is to be had cannot be used as it is written",
    "duplicate_dialog_id": "an earlier dialog has the same id, and is the one that is kept",
    "empty_context": "a picture with no text to go with it",
    "empty_file": "a file with nothing in it",
    "invalid_json": "a record that is not written as JSON",
    "invalid_utf8": "a record whose characters are not UTF-8",
    "mismatched_images": "a record that lists more or fewer pictures than it has marks for them",
    "missing_field": "a record that lacks a part that is needed",
    "no_image": "a record that is to share a picture, and shares none",
    "repaired": "a record that is read although it is not quite JSON, such as one with NaN",
    "too_large": "a record that is larger than any dialog should be",
    "too_many_broken": "the rest of a file, given up because so much of it was broken",
    "truncated": "a file that ends in the middle of a record",
    "unknown_field": "a part that is unknown, or named nearly like one that is left out",
    "wrong_type": "a part that is of another kind than expected, such as a number for a text",
}
_FAILURES = {
    "decode_error": "the file is damaged",
    "lfs_pointer": "the file only names its content, which Git LFS has yet to fetch",
    "missing_file": "there is no such file",
    "not_an_image": "the file is no picture of a known format",
    "odd_aspect": "the picture is far wider than high, or higher than wide",
    "read_error": "the file is there and could not be read",
    "too_large": "the picture has more pixels than is safe to open",
    "too_many_bytes": "the file is larger than a picture should be",
    "too_small": "the picture has too few pixels",
}

Splits = Mapping[str, Mapping[str, Any]]


def problems_section(splits: Splits) -> Section:
    """Count record issues by reason, with the first case of each."""
    title = "Problems in the records"
    counts = {split: found["problems"] for split, found in splits.items()}
    first: dict[str, Mapping[str, str]] = {}
    for found in splits.values():
        for reason, case in found["first_problems"].items():
            first.setdefault(reason, case)
    rows = reason_rows(counts.values(), lambda reason: _problem(reason, first.get(reason)))
    if not rows:
        return Section("problems", title, "<p>No record has a problem.</p>")
    intro = (
        '<p class="intro">What is broken is passed over and counted by its reason, and never '
        "repaired in silence. Of each reason the first case is named.</p>"
    )
    return Section("problems", title, intro + table(_head(counts), rows))


def _problem(reason: str, first: Mapping[str, str] | None) -> str:
    case = f"<small>first: {text(first['where'])}: {text(first['detail'])}</small>" if first else ""
    return f"{_heading(reason, _PROBLEMS)}{case}"


def images_section(splits: Splits) -> Section | OmittedSection:
    """Count the image files that can be read, and by reason those that cannot."""
    title = "Pictures that can be read"
    looked = {split: found["pictures"] for split, found in splits.items() if found["pictures"]}
    if not looked:
        return OmittedSection(title, "the picture files were not looked at")
    failures = [found["failures"] for found in looked.values()]
    rows = [
        (
            "Read<small>the file is there and is a whole picture</small>",
            count_cells(found["num_read"] for found in looked.values()),
        ),
        *reason_rows(failures, lambda reason: _heading(reason, _FAILURES)),
    ]
    others = ", ".join(text(split) for split in splits if split not in looked)
    rest = f" Those of {others} were not looked at." if others else ""
    intro = f'<p class="intro">Every distinct picture file of a split was opened once.{rest}</p>'
    return Section("pictures", title, intro + table(_head(looked), rows))


def _head(columns: Mapping[str, Any]) -> list[str]:
    return ["", *map(text, columns), *(["all"] if len(columns) > 1 else [])]


def _heading(reason: str, meanings: Mapping[str, str]) -> str:
    small = f"<small>{meanings[reason]}</small>" if reason in meanings else ""
    return capitalised(reason.replace("_", " ")) + small
