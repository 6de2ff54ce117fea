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
from d2i.report.document import render_document, render_header
from d2i.report.html import (
    OmittedSection,
    Section,
    capitalised,
    card,
    count_cells,
    counted,
    figure,
    percent,
    reason_rows,
    table,
    text,
)
from d2i.report.lengths import lengths_section
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
_LEAKS_TITLE = "Leaks between splits"
_SPLIT_WORDS = {"train": "training", "valid": "validation"}
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
        "This page shows only numbers and settings, no text and no image of the corpus. "
        f"Licence of the corpus: {text(survey['licence'])}"
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


def named_leaks(counts: Sequence[Mapping[str, Any]]) -> list[tuple[str, int]]:
    """Name each pair of splits that leaks, with its number of instances over all reasons."""
    pairs: Counter[str] = Counter()
    for count in counts:
        pairs[f"{count['split']} {_ARROW} {count['other_split']}"] += count["num_instances"]
    return list(pairs.items())


def leaks_section(survey: Mapping[str, Any]) -> Section | OmittedSection:
    """Render the leaks found, the searches not made, and how to exclude the leaks."""
    splits, leaks = survey["splits"], survey["leaks"]
    if len(splits) < 2 and not leaks["counts"]:
        return OmittedSection(_LEAKS_TITLE, "the corpus has fewer than two splits")
    intro = (
        '<p class="intro">A leak is an instance whose image is also in a split held out for '
        "evaluation: a model trained on it has seen the answer. No image of test should be in "
        "train or valid, and no image of valid in train.</p>"
    )
    largest_first = sorted(leaks["counts"], key=lambda count: -count["num_instances"])
    findings = "".join(f"<li>{_sentence(count, splits)}</li>" for count in largest_first)
    found = f'<ul class="findings">{findings}</ul>' if findings else _nothing(leaks["near"])
    return Section(
        "leaks",
        _LEAKS_TITLE,
        intro + found + _looked(leaks["near"]) + (_remedy(survey) if findings else ""),
    )


def _sentence(count: Mapping[str, Any], splits: Mapping[str, Mapping[str, Any]]) -> str:
    split, other = count["split"], text(count["other_split"])
    num_instances, word = count["num_instances"], text(_SPLIT_WORDS.get(split, split))
    verb = "has" if num_instances == 1 else "have"
    similarity = {
        "shared_image": f"an image that is also in {other}",
        "near_duplicate": f"a near-duplicate of an image in {other}",
    }.get(count["reason"], f"an image of {other} ({text(count['reason'])})")
    of_all = splits.get(split, {}).get("num_instances", 0)
    share = num_instances / of_all if of_all else 0.0
    beside = f"{percent(share)} of {text(split)}; " if share >= _LEAST_SHARE else ""
    return (
        f"<strong>{figure(num_instances, ',')}</strong> {word} "
        f"{'instance' if num_instances == 1 else 'instances'} {verb} {similarity} "
        f"<small>{beside}{counted(count['num_images'], 'image')} of {other}</small>"
    )


def _nothing(near: bool) -> str:
    near_note = ", nor a near-duplicate of one" if near else ""
    return f"<p>No split has an image of another split{near_note}.</p>"


def _looked(near: bool) -> str:
    if near:
        return (
            '<p class="note">Near-duplicates, such as a smaller copy under another name, were '
            "searched for by perceptual hash; a few matches may be due to chance.</p>"
        )
    return (
        '<p class="warning">Near-duplicates were not searched for, because no image file was read: '
        "a copy of an image under another name is not counted.</p>"
    )


def _remedy(survey: Mapping[str, Any]) -> str:
    corpus = shlex.join(["--corpus", str(survey["corpus"]), "--source", str(survey["source"])])
    return (
        "<h3>Exclude the leaks</h3><p>List them with the same options as this survey, then prepare "
        "the data without them (\N{HORIZONTAL ELLIPSIS} stands for your other options):</p>"
        f"<pre><code>d2i corpus {text(corpus)} --leaks leaks.jsonl\n"
        f"d2i preprocess {text(corpus)} --exclude leaks.jsonl \N{HORIZONTAL ELLIPSIS}</code></pre>"
    )
