"""The one drawer of charts: lines and bars over an x axis, as plain values for `chart.html`.

Positions are percentages and labels have sizes in pixels, so that a chart fits any width and its
labels stay readable on a phone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Points = Sequence[tuple[float, float]]
# Range of a chart: left and right end, low and high end, in the units of its axes.
Box = tuple[float, float, float, float]
# The bars leave this share of their bin free on either side.
_GAP = 0.06
# If the limit is beyond this percentage of the width, there is no space for a label right of it.
_NARROW_BEYOND = 60


@dataclass(frozen=True)
class Chart:
    """A chart, as `chart.html` shows it.

    Args:
        title: What it shows, in words.
        names: Names of the axes, across and up.
        across: Ticks of the axis across: percent from the left, label.
        up: Ticks of the axis up: percent from the top, label.
        lines: Kind, which is a class of the style sheet, path within 1000 x 1000, and dots in
            percent from the left and the top.
        bars: Kind, then left, top, width and height in percent, and what hovering shows.
        limit: A dashed line up: percent from the left.
        limit_labels: Labels beside it: words, anchor, shift in pixels.
    """

    title: str
    names: tuple[str, str]
    across: list[tuple[str, str]]
    up: list[tuple[str, str]]
    lines: Sequence[tuple[str, str, list[tuple[str, str]]]] = ()
    bars: Sequence[tuple[str, ...]] = ()
    limit: str = ""
    limit_labels: Sequence[tuple[str, str, int]] = ()


def line_chart(
    title: str, names: tuple[str, str], lines: Mapping[str, Points], dotted: str = ""
) -> Chart:
    """Chart lines by kind, each at least one point, in ascending order of x.

    Args:
        title: What it shows, in words.
        names: Names of the axes, across and up.
        lines: The points of each line, by kind.
        dotted: The kind of line whose points are marked.
    """
    xs = [x for points in lines.values() for x, _ in points]
    ys = [y for points in lines.values() for _, y in points]
    low, high = min(ys), max(ys)
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    box = (min(xs), max(xs), low - margin, high + margin)
    return Chart(
        title,
        names,
        _across(box, {value: f"{value:,.0f}" for value in ticks(box[0], box[1], 6)}),
        _up(box, {value: f"{value:.4g}" for value in ticks(box[2], box[3])}),
        lines=[_line(kind, points, box, dotted) for kind, points in lines.items()],
    )


def bar_chart(
    title: str,
    names: tuple[str, str],
    bars: Sequence[tuple[str, int, str]],
    bin_width: int,
    labels: Mapping[float, str],
    limit: tuple[float, str, str],
) -> Chart:
    """Chart counts by bins from 0.

    Args:
        title: What it shows, in words.
        names: Names of the axes, across and up.
        bars: Kind, count and hovering text of each bin.
        bin_width: Width of a bin in the units of the axis across.
        labels: Labels of the axis across, by value.
        limit: A value to mark, and the words left and right of the mark.
    """
    highest = max(count for _, count, _ in bars)
    box = (0.0, float(bin_width * len(bars)), 0.0, 1.05 * highest)
    up = {value: f"{value:,.0f}" for value in ticks(0, highest, min(4, highest))}
    value, before, beyond = limit
    at = 100 * _share(value, box[0], box[1])
    beside = [(before, "end", -7), (beyond, "start", 7)]
    if at > _NARROW_BEYOND:
        beside = [(f"{beyond} \N{RIGHTWARDS ARROW}", "end", -7)]
    return Chart(
        title,
        names,
        _across(box, labels),
        _up(box, up),
        bars=[_bar(place, bar, len(bars), box) for place, bar in enumerate(bars)],
        limit=f"{at:.3f}",
        limit_labels=beside,
    )


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return about `count` round numbers within [low, high]."""
    raw = (high - low) / count or 1.0
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def _across(box: Box, labels: Mapping[float, str]) -> list[tuple[str, str]]:
    return [(f"{100 * _share(at, box[0], box[1]):.2f}", label) for at, label in labels.items()]


def _up(box: Box, labels: Mapping[float, str]) -> list[tuple[str, str]]:
    return [(f"{100 - 100 * _share(at, *box[2:]):.2f}", label) for at, label in labels.items()]


def _share(value: float, low: float, high: float) -> float:
    return (value - low) / ((high - low) or 1.0)


def _line(
    kind: str, points: Points, box: Box, dotted: str
) -> tuple[str, str, list[tuple[str, str]]]:
    places = [(_share(x, box[0], box[1]), 1 - _share(y, *box[2:])) for x, y in points]
    path = " ".join(f"{1000 * x:.1f},{1000 * y:.1f}" for x, y in places)
    dots = places if kind == dotted else []
    return kind, path, [(f"{100 * x:.2f}", f"{100 * y:.2f}") for x, y in dots]


def _bar(place: int, bar: tuple[str, int, str], num_bars: int, box: Box) -> tuple[str, ...]:
    kind, count, title = bar
    width, height = 100 / num_bars, 100 * count / box[3]
    # Left, top, width and height.
    sides = ((place + _GAP) * width, 100 - height, (1 - 2 * _GAP) * width, height)
    return (kind, *(f"{side:.3f}" for side in sides), title)
