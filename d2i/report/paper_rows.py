"""The paper's own numbers (Tables 2, 3 and 5), and the rules for comparing a system with them.

`paper.json` holds the numbers that were readable in the published text; null marks the others.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.resources import files
from typing import Any

from d2i.metric_specs import PAPER_METRICS
from d2i.recipes import RECIPES

PUBLISHED_EXTRACTOR = "inception-v3-compat 6726825d"
"""Feature extractor of the paper's FID and IS; scores on any other are not comparable with them."""
BACKBONES = {
    "uvit-s": "U-ViT-Small",
    "uvit-s-deep": "U-ViT-Small(Deep)",
    "unidiffuser-v1": "UniDiffuser-v1",
}
"""The paper's names of the backbones."""
OURS = " + ours"
"""Suffix that the paper adds to these names after fine-tuning."""
SYSTEM_OF_TABLE_3 = BACKBONES["unidiffuser-v1"] + OURS
_UNCLIP = "it is unCLIP (Karlo), the paper's DALL-E 2 is LAION's dalle2-laion"
_MAX_COUNT_DIFFERENCE = 0.05
"""Largest relative difference of a test split's size from the paper's: releases and readers differ
by a few broken records; `--limit` and other corpora by far more."""
_MIN_SCORED = 0.8
"""Least share of the test split that must be scored: URLs die, and scores depend on the number of
images."""


PaperScores = Mapping[str, tuple[float | None, float | None]]
"""Value and deviation of one row by key of the metric; None if not readable in the paper."""


def label_of(card: Mapping[str, Any]) -> str | None:
    """Return the name of a system, or None if its card has none.

    An unCLIP pipeline is called unCLIP (Karlo), never DALL-E 2, which is another model in the
    paper: older evaluations use that name, and `dalle2` as its kind.
    """
    label = card.get("label") or card.get("system")
    if card.get("kind") in ("unclip", "dalle2") and _letters(str(label)) == "dalle2":
        return "unCLIP (Karlo)"
    return str(label) if label else None


def paper_row(card: Mapping[str, Any], strategy: str = "hash") -> str:
    """Return the name of a system: the paper's row if it earned one, else its own label.

    Args:
        card: The metric card.
        strategy: The linearization of the row.
    """
    return matching_row(card, strategy) or own_name(card)


def own_name(card: Mapping[str, Any]) -> str:
    """Return a system's own label, marked as not the paper's if it equals a name in the paper."""
    label = str(label_of(card))
    # The paper's names for its own systems are always reserved, even if its rows are not shown.
    taken = _rows_of_backbones() if comparison_mismatches(card) else _rows_by_letters().values()
    is_taken = _letters(label) in map(_letters, taken)
    return f"{label}, not the paper's" if is_taken else label


def proven_label(card: Mapping[str, Any]) -> str | None:
    """Return a system's own label, or None; what its card does not prove is marked as a label.

    A name of the paper needs the paper's setup, and `fine-tuned` a run.
    """
    label = label_of(card)
    if label is None:
        return None
    is_earned = _letters(matching_row(card) or "") == _letters(label)
    name = label if is_earned else own_name(card)
    denied = re.search(r"\bnot fine-?tuned\b", label, re.IGNORECASE)
    claimed = not denied and re.search(r"\bfine-?tuned\b", label, re.IGNORECASE)
    is_unproven = denied if card.get("run") else claimed
    return f"{name} (by its label)" if is_unproven else name


def matching_row(card: Mapping[str, Any], strategy: str = "hash") -> str | None:
    """Return the row of the paper's tables that a system earned, or None."""
    if comparison_mismatches(card) or setup_mismatches(card, strategy):
        return None
    return _row_name(card)


def row_mismatches(card: Mapping[str, Any], strategy: str = "hash") -> list[str]:
    """Return the reasons why a system has not earned its row; empty also if it has no row."""
    if _row_name(card) is None:
        return []
    return [*comparison_mismatches(card), *setup_mismatches(card, strategy)]


def comparison_mismatches(card: Mapping[str, Any]) -> list[str]:
    """Return the reasons why scores are not comparable with the paper's, for any system.

    Returns:
        A phrase for each; none for scores on the paper's test split and feature extractor.
    """
    corpus = card.get("corpus")
    if not paper_table2(str(corpus)):
        return [f"the corpus is {corpus or 'not recorded'}"]
    return [*_of_extractor(card), *_of_test_split(card, _num_test(str(corpus)))]


def setup_mismatches(card: Mapping[str, Any], strategy: str = "hash") -> list[str]:
    """Return the reasons why a system differs from the paper's row of its name; empty for none."""
    found = list(_of_count(card))
    if card.get("backbone") in BACKBONES:
        return [*_of_sizes(card), *_of_weights(card), *_of_text(card, strategy), *found]
    if _row_name(card) in _rows_of_backbones():
        found.append("its sizes and its initial weights are not recorded")
    if card.get("kind") in ("unclip", "dalle2"):
        found.append(_UNCLIP)
    return found


def paper_table2(corpus: str) -> dict[str, PaperScores]:
    """Return the rows of Table 2 for a corpus, in the paper's order; empty for any other."""
    rows = _paper()["table2"].get(corpus, {})
    return {name: _scores(row) for name, row in rows.items() if isinstance(row, dict)}


def paper_table3() -> dict[str, PaperScores]:
    """Return the rows of Table 3 by linearization: UniDiffuser-v1, fine-tuned, on PhotoChat."""
    rows = _paper()["table3"]
    return {name: _scores(row) for name, row in rows.items() if isinstance(row, dict)}


def paper_table5() -> dict[str, dict[str, list[Any]]]:
    """Return [resolution, global batch, devices] by corpus and backbone."""
    rows: dict[str, Any] = _paper()["table5"]
    return {corpus: row for corpus, row in rows.items() if isinstance(row, dict)}


def paper_gain(rows: Mapping[str, PaperScores], name: str, key: str) -> float | None:
    """Return a score of a fine-tuned row minus that of its backbone, as the paper's table has them.

    Args:
        rows: As returned by `paper_table2`.
        name: Name of the row.
        key: Key of the metric.
    """
    before = rows.get(name.removesuffix(OURS), {}).get(key, (None, None))[0]
    after = rows.get(name, {}).get(key, (None, None))[0]
    if not name.endswith(OURS) or before is None or after is None:
        return None
    # Rounded to the digits that are printed, as a difference of two floats has more.
    return round(after - before, 4)


def paper_notes(table: str, corpus: str | None = None) -> list[str]:
    """Return the footnotes of the paper's numbers: their source, and any peculiarities.

    Args:
        table: `table2` or `table3`.
        corpus: The corpus, for `table2`.
    """
    paper = _paper()
    rows = paper[table][corpus] if corpus else paper[table]
    notes = [f"(paper): {paper['source']}; {paper['blank']}."]
    if "note" in rows:
        notes.append(f"(paper): {rows['note']}.")
    noted = {name: row["note"] for name, row in rows.items() if _is_noted(row)}
    return notes + [f"(paper), {name}: {note}." for name, note in noted.items()]


def paper_words(table: str, name: str, corpus: str | None = None) -> str:
    """Describe the source of the paper's numbers in a row, and any peculiarities."""
    paper = _paper()
    rows = paper[table][corpus] if corpus else paper[table]
    row = rows.get(name)
    notes = [row["note"]] if _is_noted(row) else []
    # The note of a whole table applies to its rows with a missing value.
    if "note" in rows and isinstance(row, dict) and None in row.values():
        notes.append(rows["note"])
    origin = f"the paper, Table {table.removeprefix('table')}"
    return "; ".join([origin, *notes])


def _is_noted(row: Any) -> bool:
    return isinstance(row, dict) and "note" in row


def _of_extractor(card: Mapping[str, Any]) -> Iterator[str]:
    if card.get("extractor") != PUBLISHED_EXTRACTOR:
        yield f"extractor {card.get('extractor')}, the paper's {PUBLISHED_EXTRACTOR}"


def _of_test_split(card: Mapping[str, Any], num_test: int) -> Iterator[str]:
    split, expected = card.get("split"), card.get("expected") or 0
    if split != "test":
        yield f"the split is {split or 'not recorded'}"
    elif abs(expected - num_test) > _MAX_COUNT_DIFFERENCE * num_test:
        yield f"{expected:,} test instances, the paper's {num_test:,}"
    if options := card.get("corpus_options"):
        words = ", ".join(f"corpus.{name}={value}" for name, value in options.items())
        yield f"instances were prepared with {words}"


def _of_count(card: Mapping[str, Any]) -> Iterator[str]:
    found, expected = card.get("found") or 0, card.get("expected") or 0
    if found < _MIN_SCORED * expected:
        yield f"only {found:,} of {expected:,} instances were scored"


def _of_sizes(card: Mapping[str, Any]) -> Iterator[str]:
    changed = card.get("changed_sizes")
    if changed is None:
        yield "its sizes are not recorded"
        return
    named = dict(changed)
    if {"depth", "dim"} <= named.keys():
        (depth, depth_there), (dim, dim_there) = named.pop("depth"), named.pop("dim")
        yield f"{depth} blocks of width {dim}, published {depth_there} of {dim_there}"
    for name, (size, published) in named.items():
        yield f"{name} {size}, published {published}"


def _of_weights(card: Mapping[str, Any]) -> Iterator[str]:
    if "initial_weights" not in card:
        yield "its initial weights are not recorded"
        return
    initial = card["initial_weights"] or {}
    if initial.get("file") in (None, "scratch"):
        yield "its initial weights are random"
    elif initial.get("initialisation"):
        yield "its initial weights are untrained, an initialisation"
    elif not initial.get("layout"):
        yield f"its initial weights, {initial['file']}, are not in a published layout"


def _of_text(card: Mapping[str, Any], strategy: str) -> Iterator[str]:
    """Compare the text settings of evaluation and of training with the recipe's."""
    corpus = card.get("corpus")
    recipe = RECIPES.get(f"{card.get('backbone')}-{corpus}")
    if recipe is None:
        return
    # Storing text latents in the shards does not change the text.
    published = recipe().text.model_dump(mode="json", exclude={"latents"}) | {"strategy": strategy}
    read = {"evaluated": card.get("text")}
    if card.get("run"):
        read["trained"] = card.get("trained_text")
        if card.get("trained_corpus") is None:
            yield "the corpus that it was trained on is not recorded"
        elif card["trained_corpus"] != corpus:
            yield f"trained on {card['trained_corpus']}"
    for how, text in read.items():
        if text is None:
            yield f"the text that it was {how} on is not recorded"
            continue
        for name, value in published.items():
            if text.get(name, value) != value:
                yield f"{how} with text.{name}={_json(text[name])}, the paper's {_json(value)}"


def _json(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _row_name(card: Mapping[str, Any]) -> str | None:
    """Return the row that a system would have; labels match regardless of case and hyphens."""
    backbone = BACKBONES.get(str(card.get("backbone")))
    if backbone is not None:
        return backbone + (OURS if card.get("run") else "")
    if card.get("backbone"):
        return None
    return _rows_by_letters().get(_letters(str(card.get("label") or card.get("system"))))


def _rows_of_backbones() -> list[str]:
    return [name + suffix for name in BACKBONES.values() for suffix in ("", OURS)]


@cache
def _rows_by_letters() -> dict[str, str]:
    corpora = (rows for rows in _paper()["table2"].values() if isinstance(rows, dict))
    return {_letters(name): name for rows in corpora for name in rows if name != "note"}


def _letters(name: str) -> str:
    return re.sub(r"[\W_]+", "", name).lower()


def _num_test(corpus: str) -> int:
    return int(_paper()["instances"][corpus]["test"])


def _scores(row: Mapping[str, Any]) -> PaperScores:
    found: dict[str, tuple[float | None, float | None]] = {}
    for metric in PAPER_METRICS:
        value = row.get(metric.key)
        found[metric.key] = (value[0], value[1]) if isinstance(value, list) else (value, None)
    return found


@cache
def _paper() -> dict[str, Any]:
    content = files("d2i.report").joinpath("paper.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(content)
    return found
