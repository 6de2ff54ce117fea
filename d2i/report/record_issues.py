"""Record issues of a corpus, and image files that cannot be read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from d2i.report.counts import count_cells, reason_rows
from d2i.report.html import OmittedSection, Section, capitalised, table, text

_PROBLEMS = {
    "bad_image_ref": "the path or URL of an image is not usable",
    "duplicate_dialog_id": "an earlier dialog has the same id; the earlier one is kept",
    "empty_context": "an image without any context",
    "empty_file": "the file is empty",
    "invalid_json": "the record is not valid JSON",
    "invalid_utf8": "the record is not valid UTF-8",
    "mismatched_images": "the record lists more or fewer images than it has placeholders",
    "missing_field": "a required field is missing",
    "no_image": "the record should share an image, and shares none",
    "repaired": "read although it is not strict JSON, for example with NaN",
    "too_large": "the record is larger than any dialog should be",
    "too_many_broken": "the rest of the file was skipped: too much of it was broken",
    "truncated": "the file ends in the middle of a record",
    "unknown_field": "a field is unknown, or resembles the name of a missing one (a typo?)",
    "wrong_type": "a field has the wrong type, such as a number instead of a string",
}
_FAILURES = {
    "decode_error": "the file is damaged",
    "lfs_pointer": "the file is a Git LFS pointer; fetch its content with git lfs pull",
    "missing_file": "the file does not exist",
    "not_an_image": "the file is not an image of a supported format",
    "odd_aspect": "the image is far wider than high, or higher than wide",
    "read_error": "the file exists but could not be read",
    "too_large": "the image has more pixels than is safe to decode",
    "too_many_bytes": "the file is larger than an image should be",
    "too_small": "the image has too few pixels",
}

Splits = Mapping[str, Mapping[str, Any]]


def problems_section(splits: Splits) -> Section:
    """Count record issues by reason, with the first case of each."""
    title = "Record issues"
    counts = {split: found["problems"] for split, found in splits.items()}
    first: dict[str, Mapping[str, str]] = {}
    for found in splits.values():
        for reason, case in found["first_problems"].items():
            first.setdefault(reason, case)
    rows = reason_rows(counts.values(), lambda reason: _problem(reason, first.get(reason)))
    if not rows:
        return Section("problems", title, "<p>No record has an issue.</p>")
    intro = (
        '<p class="intro">Broken records are skipped and counted by reason, and never repaired '
        "silently. Each reason names its first case.</p>"
    )
    return Section("problems", title, intro + table(_head(counts), rows))


def _problem(reason: str, first: Mapping[str, str] | None) -> str:
    case = f"<small>first: {text(first['where'])}: {text(first['detail'])}</small>" if first else ""
    return f"{_heading(reason, _PROBLEMS)}{case}"


def images_section(splits: Splits) -> Section | OmittedSection:
    """Count the image files that can be read, and by reason those that cannot."""
    title = "Image files"
    looked = {split: found["pictures"] for split, found in splits.items() if found["pictures"]}
    if not looked:
        return OmittedSection(title, "the image files were not opened")
    failures = [found["failures"] for found in looked.values()]
    rows = [
        (
            "Read<small>the file exists and is a complete image</small>",
            count_cells(found["num_read"] for found in looked.values()),
        ),
        *reason_rows(failures, lambda reason: _heading(reason, _FAILURES)),
    ]
    others = ", ".join(text(split) for split in splits if split not in looked)
    rest = f" Those of {others} were not opened." if others else ""
    intro = f'<p class="intro">Every distinct image file of a split was opened once.{rest}</p>'
    return Section("images", title, intro + table(_head(looked), rows))


def _head(columns: Mapping[str, Any]) -> list[str]:
    return ["", *map(text, columns), *(["all"] if len(columns) > 1 else [])]


def _heading(reason: str, meanings: Mapping[str, str]) -> str:
    small = f"<small>{meanings[reason]}</small>" if reason in meanings else ""
    return capitalised(reason.replace("_", " ")) + small
