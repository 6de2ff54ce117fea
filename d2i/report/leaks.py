"""Leaks between splits in plain words, and how to exclude them."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from d2i.report.html import OmittedSection, Section, counted, figure, percent, text

_TITLE = "Leaks between splits"
_SPLIT_WORDS = {"train": "training", "valid": "validation"}
# A share below this one would be shown as 0.0 %.
_LEAST_SHARE = 0.0005
_ARROW = "\N{RIGHTWARDS ARROW}"


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
        return OmittedSection(_TITLE, "the corpus has fewer than two splits")
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
        _TITLE,
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
