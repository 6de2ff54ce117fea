"""Effect of changing each option of the corpus and of its text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from d2i.report.html import OmittedSection, Section, figure, is_number, percent, table, text

_TITLE = "Effect of each option"
_HEAD = ("", "Instances", "Change", "Empty contexts", "Mean tokens", "Too long")
_MEANINGS = {
    "corpus.direction": "context of an image: the turns before it, or those after it",
    "corpus.own_turn": "include the text of the image\u2019s own turn in its context, or not",
    "corpus.images_in_turn": "use every image of a turn, or only the first",
    "corpus.repeated": "use an image again when it is shared again, or not",
    "corpus.earlier_images": "text inserted for each image shared earlier",
    "corpus.emoji": "keep a name like :smile:, replace it by the character, or remove it",
    "text.strategy": "linearization: how turns are joined into one line",
    "text.empty_turns": "drop turns without text, or keep a mark for each",
    "text.speaker_runs": "join consecutive turns of one speaker, or not",
    "text.max_turns": "maximum number of turns",
    "text.keep": "side of a context that is kept when it is truncated",
    "text.cut": "truncate a context by whole turns, or within a turn",
    "text.num_windows": "number of windows of the text encoder",
}


def variants_section(survey: Mapping[str, Any]) -> Section | OmittedSection:
    """Render one table per split: the options as set, then each change of one option."""
    splits = survey["splits"]
    if not splits:
        return OmittedSection(_TITLE, "the corpus has no split")
    intro = (
        '<p class="intro">Each row changes one option and leaves all others as set; pass it to '
        "<code>--set</code> as written. Empty contexts are images without any text, which give no "
        "instance. Too long are contexts with more tokens than the limit, after dropping whole "
        "turns where an option does so.</p>"
    )
    tables = "".join(_split_table(split, found) for split, found in splits.items())
    return Section("options", _TITLE, intro + tables + _options(survey))


def _split_table(split: str, found: Mapping[str, Any]) -> str:
    lengths, variants = found["lengths"], found["variants"]
    before = ["", *(variant["option"] for variant in variants)]
    rows = [
        ("as set", _as_set_cells(found)),
        *(
            (_heading(variant, is_first=variant["option"] != last), _cells(variant, found))
            for last, variant in zip(before, variants, strict=False)
        ),
    ]
    counted_on = (
        "Instances and empty contexts are counted over the whole split, tokens on a sample of "
        f"{figure(lengths['num_sampled'], ',')} instances of the options as set."
    )
    return f"<h3>{text(split)}</h3><p>{counted_on}</p>{table(_HEAD, rows)}"


def _as_set_cells(found: Mapping[str, Any]) -> list[str]:
    lengths = found["lengths"]
    return [
        figure(found["num_instances"], ","),
        "",
        figure(found["problems"].get("empty_context", 0), ","),
        *_token_cells(lengths["mean"], lengths["share_over"]),
    ]


def _cells(variant: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    change = variant["num_instances"] - found["num_instances"]
    return [
        figure(variant["num_instances"], ","),
        figure(change, "+,") if change else '<span class="absent">none</span>',
        figure(variant["num_empty"], ","),
        *_token_cells(variant["mean_tokens"], variant["share_over"]),
    ]


def _token_cells(mean: float | None, share_over: float | None) -> list[str]:
    absent = '<span class="absent">not measured</span>'
    return [
        figure(mean, ",.1f") if is_number(mean) else absent,
        percent(share_over) if is_number(share_over) else absent,
    ]


def _heading(variant: Mapping[str, Any], *, is_first: bool) -> str:
    """Render a change as `--set` accepts it; an option's first change also explains the option."""
    name = _full_name(variant["option"])
    small = f"<small>{_MEANINGS[name]}</small>" if is_first and name in _MEANINGS else ""
    return f"<code>{text(name)}={text(variant['value'])}</code>{small}"


def _full_name(option: str) -> str:
    """Add the prefix `corpus.` to an option of the corpus, which the survey leaves out."""
    return option if "." in option else f"corpus.{option}"


def _options(survey: Mapping[str, Any]) -> str:
    options = {f"corpus.{name}": value for name, value in survey["options"].items()}
    options |= {f"text.{name}": value for name, value in survey["text"].items()}
    rows = [(f"<code>{text(name)}</code>", [_shown(value)]) for name, value in options.items()]
    return (
        "<details><summary>The options as set</summary>"
        f"{table(['Option', 'Value'], rows)}"
        "<p>An option that is not listed has its default.</p></details>"
    )


def _shown(value: Any) -> str:
    if value is None:
        return '<span class="absent">not set</span>'
    return f"<code>{text(value if value and isinstance(value, str) else json.dumps(value))}</code>"
