"""Effect of changing each option of the corpus and of its text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any

from d2i.report.document import OmittedSection, Section
from d2i.report.table import Cell, Row, Table, number_cell, without_blanks

_TITLE = "Effect of each option"
_COLUMNS = ("Instances", "Change", "Empty contexts", "Mean tokens", "Too long")


def variants_section(survey: Mapping[str, Any]) -> Section | OmittedSection:
    """Show one table per split: the options as set, then each change of one option."""
    splits = survey["splits"]
    if not splits:
        return OmittedSection(_TITLE, "the corpus has no split")
    parts = [
        {
            "split": split,
            "num_sampled": found["lengths"]["num_sampled"],
            "table": without_blanks(_split_table(found)),
        }
        for split, found in splits.items()
    ]
    values = {"splits": parts, "options": _options(survey)}
    return Section("options", _TITLE, "variants.html", values)


@cache
def meanings(kind: str) -> dict[str, str]:
    """Return what each option, record issue or failure of an image means, in words."""
    content = files("d2i.report").joinpath("corpus_words.json").read_text(encoding="utf-8")
    found: dict[str, str] = json.loads(content)[kind]
    return found


def _split_table(found: Mapping[str, Any]) -> Table:
    lengths, num_instances = found["lengths"], found["num_instances"]
    rows = [
        Row(
            "as set",
            (
                Cell(num_instances, ","),
                Cell(),
                Cell(found["problems"].get("empty_context", 0), ","),
                *_token_cells(lengths["mean"], lengths["share_over"]),
            ),
        )
    ]
    last = ""
    for variant in found["variants"]:
        name = _full_name(variant["option"])
        # The first change of an option also explains it.
        note = meanings("options").get(name, "") if name != last else ""
        last = name
        change = variant["num_instances"] - num_instances
        cells = (
            Cell(variant["num_instances"], ","),
            Cell(change, "+,") if change else Cell(blank="none"),
            Cell(variant["num_empty"], ","),
            *_token_cells(variant["mean_tokens"], variant["share_over"]),
        )
        rows.append(Row(f"{name}={variant['value']}", cells, note=note, is_code=True))
    return Table("", _COLUMNS, tuple(rows))


def _token_cells(mean: float | None, share_over: float | None) -> tuple[Cell, Cell]:
    return (
        number_cell(mean, ",.1f", "not measured"),
        number_cell(share_over, ".1%", "not measured"),
    )


def _full_name(option: str) -> str:
    """Add the prefix `corpus.` to an option of the corpus, which the survey leaves out."""
    return option if "." in option else f"corpus.{option}"


def _options(survey: Mapping[str, Any]) -> Table:
    options = {f"corpus.{name}": value for name, value in survey["options"].items()}
    options |= {f"text.{name}": value for name, value in survey["text"].items()}
    rows = tuple(Row(name, (_value(value),), is_code=True) for name, value in options.items())
    return Table("", ("Value",), rows, corner="Option")


def _value(value: Any) -> Cell:
    if value is None:
        return Cell(blank="not set")
    words = value if value and isinstance(value, str) else json.dumps(value)
    return Cell(words, is_code=True)
