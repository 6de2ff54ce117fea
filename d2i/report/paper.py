"""The paper's own numbers (Tables 2, 3 and 5), and what its rows are called.

`paper.json` holds what could be read in the published text; null is what could not.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any

from d2i.metric_specs import PAPER_METRICS

PUBLISHED_EXTRACTOR = "inception-v3-compat 6726825d"
"""What FID and IS of the paper are computed on; beside any other its numbers say nothing."""
_BACKBONES = {
    "uvit-s": "U-ViT-Small",
    "uvit-s-deep": "U-ViT-Small(Deep)",
    "unidiffuser-v1": "UniDiffuser-v1",
}
_OURS = " + ours"
SYSTEM_OF_TABLE_3 = _BACKBONES["unidiffuser-v1"] + _OURS


PaperScores = Mapping[str, tuple[float | None, float | None]]
"""Value and deviation of one row by key of the metric; None where the paper's was not readable."""


def label_of(card: Mapping[str, Any]) -> str | None:
    """Return what to call a system, or None where its card has no name.

    An unCLIP pipeline has Karlo's name, and never that of the paper's DALL-E 2, which is another:
    evaluations made before call it so, and `dalle2` its kind.
    """
    label = card.get("label") or card.get("system")
    if card.get("kind") in ("unclip", "dalle2") and _letters(str(label)) == "dalle2":
        return "unCLIP (Karlo)"
    return str(label) if label else None


def paper_row(card: Mapping[str, Any]) -> str:
    """Name a system as the paper's Table 2 does, or by its label where that has no row for it.

    A label is that of a row whatever its capitals and hyphens: `minigpt5` is MiniGPT-5.
    """
    backbone = _BACKBONES.get(str(card.get("backbone")))
    if backbone is None:
        label = str(label_of(card))
        return _rows_by_letters().get(_letters(label), label)
    return backbone + (_OURS if card.get("run") else "")


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


@cache
def _rows_by_letters() -> dict[str, str]:
    corpora = (rows for rows in _paper()["table2"].values() if isinstance(rows, dict))
    return {_letters(name): name for rows in corpora for name in rows}


def _letters(name: str) -> str:
    return re.sub(r"[\W_]+", "", name).lower()


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
