"""Effect of changing each option of the corpus and of its text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from d2i.report.html import OmittedSection, Section, figure, is_number, percent, table, text

_TITLE = "What each option would change"
_HEAD = ("", "Instances", "Change", "Empty contexts", "Mean tokens", "Too long")
_MEANINGS = {
    "corpus.direction": "whether a picture answers what is before it, or opens what follows",
    "corpus.own_turn": "whether text in the picture\u2019s own turn is part of its context",
    "corpus.images_in_turn": "whether every picture of a turn is used, or the first alone",
    "corpus.repeated": "whether a picture that is shared again is used again",
    "corpus.earlier_images": "what stands in the text for each picture shared earlier",
    "corpus.emoji": "whether a name like :smile: stays, becomes the character, or goes",
    "text.strategy": "how the turns are joined into one line of text",
    "text.empty_turns": "whether a turn without text gets a mark of its own",
    "text.speaker_runs": "whether turns in a row by one speaker are joined into one",
    "text.max_turns": "how many turns are read at most",
    "text.keep": "which side of a context is kept where not all of it is",
    "text.cut": "whether a context that is too long loses whole turns, or is cut within one",
    "text.num_windows": "how many windows of the encoder\u2019s size are read",
}


def variants_section(survey: Mapping[str, Any]) -> Section | OmittedSection:
    """Render one table per split: the options as set, then each change of one option."""
    splits = survey["splits"]
    if not splits:
        return OmittedSection(_TITLE, "the corpus has no split")
    intro = (
        '<p class="intro">Each line changes one option and leaves all others as set; after '
        "<code>--set</code> it can be given as it is written here. An empty context is a picture "
        "with no text to go with it, which gives no instance. Too long is a context with more "
        "tokens than fit, once whole turns were left out where an option says so.</p>"
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
        f"{figure(lengths['num_sampled'], ',')} instances, drawn from those as set."
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
