"""Context lengths of a corpus: a histogram of tokens for each split."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from d2i.report.document import OmittedSection, Section
from d2i.report.svg import Chart, bar_chart
from d2i.report.table import Cell, Row, Table

_TITLE = "Context lengths"
# Least distance between two labels below the plot, as a share of its width.
_LABEL_SHARE = 0.12
_CUT = {
    "end": "longer ones are truncated at the start, which keeps the latest turns",
    "start": "longer ones are truncated at the end, which keeps the first turns",
}


def lengths_section(
    splits: Mapping[str, Mapping[str, Any]], options: Mapping[str, Any]
) -> Section | OmittedSection:
    """Plot the lengths of each split whose contexts were measured; `options` are those of text."""
    if not any(found["lengths"]["num_sampled"] for found in splits.values()):
        return OmittedSection(_TITLE, "no context was measured")
    charts = [
        {
            "split": split,
            "lengths": found["lengths"],
            "num_instances": found["num_instances"],
            "chart": _chart(split, found["lengths"]),
            "table": _table(found["lengths"]),
        }
        for split, found in splits.items()
    ]
    cut = _CUT.get(options.get("keep", ""), "longer ones are truncated")
    return Section("lengths", _TITLE, "lengths.html", {"cut": cut, "charts": charts})


def bin_name(place: int, lengths: Mapping[str, Any]) -> str:
    """Return the label of a bin of lengths; the last bin is open above."""
    width, last = lengths["bin_width"], len(lengths["counts"]) - 1
    if place == last:
        return f"{place * width + 1:,} tokens or more"
    return f"{place * width + (place > 0):,} to {(place + 1) * width:,} tokens"


def _table(lengths: Mapping[str, Any]) -> Table:
    rows = tuple(
        Row(bin_name(place, lengths), (Cell(count, ","),))
        for place, count in enumerate(lengths["counts"])
    )
    return Table("", ("Contexts",), rows, corner="Length")


def _chart(split: str, lengths: Mapping[str, Any]) -> Chart | None:
    if not lengths["num_sampled"]:
        return None
    width, room = lengths["bin_width"], lengths["room"]
    share = f"{100 * lengths['share_over']:.1f}"
    bars = [
        (
            "within" if place * width < room else "beyond",
            count,
            f"{bin_name(place, lengths)}: {count:,}",
        )
        for place, count in enumerate(lengths["counts"])
    ]
    return bar_chart(
        f"{split}: contexts by their number of tokens, {share} % exceed the limit of {room:,}",
        ("tokens", "contexts"),
        bars,
        width,
        _labels(lengths),
        (room, "fits", f"{share}\N{NARROW NO-BREAK SPACE}% too long"),
    )


def _labels(lengths: Mapping[str, Any]) -> dict[float, str]:
    """Label the multiples of the token limit that are clear of the last bin, and that bin."""
    width, num_bins = lengths["bin_width"], len(lengths["counts"])
    open_from, middle = width * (num_bins - 1), width * (num_bins - 0.5)
    clear = middle - _LABEL_SHARE * width * num_bins
    labels = {float(at): f"{at:,}" for at in range(0, open_from, lengths["room"]) if at < clear}
    return labels | {middle: f"{open_from:,}+"}
