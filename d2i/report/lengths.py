"""Context lengths of a corpus: a histogram of tokens for each split."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from d2i.report.html import OmittedSection, Section, counted, figure, percent, table, text
from d2i.report.svg import Box, axes, axis_names, ticks

_TITLE = "Context lengths"
_NUM_TICKS = 4
# Least distance between two labels below the plot, as a share of its width.
_LABEL_SHARE = 0.12
# If the token limit is beyond this percentage of the width, there is no space for a label right of
# it.
_NARROW_BEYOND = 60
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
    cut = _CUT.get(options.get("keep", ""), "longer ones are truncated")
    intro = (
        '<p class="intro">Lengths of contexts, the text that belongs to an image, in tokens of the '
        f"text encoder. The encoder reads a limited number of tokens: {cut}. Lengths are before "
        "truncation, measured on a sample of each split.</p>"
        '<ul class="legend"><li><i class="swatch within"></i>fits</li>'
        '<li><i class="swatch beyond"></i>too long</li></ul>'
    )
    charts = "".join(_chart(split, found) for split, found in splits.items())
    return Section("lengths", _TITLE, f'{intro}<div class="charts">{charts}</div>')


def _chart(split: str, found: Mapping[str, Any]) -> str:
    lengths = found["lengths"]
    name = f"<h3>{text(split)}</h3>"
    if not lengths["num_sampled"]:
        return f'<div class="chart">{name}<p>No context was measured.</p></div>'
    facts = (
        f"<strong>{percent(lengths['share_over'])}</strong> exceed the limit of "
        f"{figure(lengths['room'], ',')} tokens. Mean {figure(lengths['mean'], ',.1f')}, maximum "
        f"{figure(lengths['longest'], ',')} tokens. "
        f"Measured on a sample of {figure(lengths['num_sampled'], ',')} of "
        f"{counted(found['num_instances'], 'instance')}."
    )
    return (
        f'<figure class="chart">{name}{_svg(split, lengths)}'
        f"<figcaption>{facts}{_details(lengths)}</figcaption></figure>"
    )


def _details(lengths: Mapping[str, Any]) -> str:
    rows = [
        (bin_name(place, lengths), [figure(count, ",")])
        for place, count in enumerate(lengths["counts"])
    ]
    return f"<details><summary>As a table</summary>{table(['Length', 'Contexts'], rows)}</details>"


def bin_name(place: int, lengths: Mapping[str, Any]) -> str:
    """Return the label of a bin of lengths; the last bin is open above."""
    width, last = lengths["bin_width"], len(lengths["counts"]) - 1
    if place == last:
        return f"{place * width + 1:,} tokens or more"
    return f"{place * width + (place > 0):,} to {(place + 1) * width:,} tokens"


def _svg(split: str, lengths: Mapping[str, Any]) -> str:
    counts, width = lengths["counts"], lengths["bin_width"]
    highest = max(counts)
    box = (0.0, float(width * len(counts)), 0.0, 1.05 * highest)
    up = {value: f"{value:,.0f}" for value in ticks(0, highest, min(_NUM_TICKS, highest))}
    bars = "".join(_bar(place, count, box, lengths) for place, count in enumerate(counts))
    title = (
        f"{text(split)}: contexts by their number of tokens, "
        f"{100 * lengths['share_over']:.1f} % exceed the limit of {lengths['room']:,}"
    )
    return (
        f'<svg role="img" width="100%" height="240"><title>{title}</title>'
        f"{axes(box, _labels(lengths), up)}{bars}{_edge(box, lengths)}"
        f"{axis_names('tokens', 'contexts')}</svg>"
    )


def _bar(place: int, count: int, box: Box, lengths: Mapping[str, Any]) -> str:
    start, width = place * lengths["bin_width"], 100 * lengths["bin_width"] / box[1]
    kind = "within" if start < lengths["room"] else "beyond"
    height = 100 * count / box[3]
    return (
        f'<rect class="{kind}" x="{100 * start / box[1] + 0.06 * width:.3f}%" '
        f'y="{100 - height:.3f}%" width="{0.88 * width:.3f}%" height="{height:.3f}%">'
        f"<title>{bin_name(place, lengths)}: {count:,}</title></rect>"
    )


def _labels(lengths: Mapping[str, Any]) -> dict[float, str]:
    """Label the multiples of the token limit that are clear of the last bin, and that bin."""
    width, num_bins = lengths["bin_width"], len(lengths["counts"])
    open_from, middle = width * (num_bins - 1), width * (num_bins - 0.5)
    clear = middle - _LABEL_SHARE * width * num_bins
    labels = {float(at): f"{at:,}" for at in range(0, open_from, lengths["room"]) if at < clear}
    return labels | {middle: f"{open_from:,}+"}


def _edge(box: Box, lengths: Mapping[str, Any]) -> str:
    """Mark the token limit, and label the share of contexts beyond it."""
    at = 100 * lengths["room"] / box[1]
    beyond = f"{100 * lengths['share_over']:.1f}\N{NARROW NO-BREAK SPACE}% too long"
    if at > _NARROW_BEYOND:
        sides = _side(at, -7, "end", f"{beyond} \N{RIGHTWARDS ARROW}")
    else:
        sides = _side(at, -7, "end", "fits") + _side(at, 7, "start", beyond)
    return f'<line class="edge" x1="{at:.3f}%" x2="{at:.3f}%" y1="-18" y2="100%"/>{sides}'


def _side(at: float, shift: int, anchor: str, label: str) -> str:
    return (
        f'<text class="side" x="{at:.3f}%" y="0" dx="{shift}" dy="-8" '
        f'text-anchor="{anchor}">{label}</text>'
    )
