"""Shared parts of plots: round ticks, and the frame with its labels.

Positions are percentages and labels have sizes in pixels, so that a plot fits any width and its
labels stay readable on a phone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

# Range of a plot: left and right end, low and high end, in the units of its axes.
Box = tuple[float, float, float, float]


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return about `count` round numbers within [low, high]."""
    raw = (high - low) / count or 1.0
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def axes(box: Box, across: Mapping[float, str], up: Mapping[float, str]) -> str:
    """Render the frame: a labelled tick at each value across, a labelled line at each value up."""
    left, right, low, high = box
    lines = "".join(
        f'<line class="grid" x1="0" x2="100%" y1="{y}%" y2="{y}%"/>'
        f'<text x="0" y="{y}%" dx="-8" dy="4" text-anchor="end">{label}</text>'
        for value, label in up.items()
        for y in [f"{100 * (high - value) / (high - low):.2f}"]
    )
    marks = "".join(
        f'<line class="tick" x1="{x}%" x2="{x}%" y1="100%" y2="98%"/>'
        f'<text x="{x}%" y="100%" dy="20" text-anchor="middle">{label}</text>'
        for value, label in across.items()
        for x in [f"{100 * (value - left) / ((right - left) or 1):.2f}"]
    )
    frame = (
        '<line class="tick" x1="0" x2="0" y1="0" y2="100%"/>'
        '<line class="tick" x1="0" x2="100%" y1="100%" y2="100%"/>'
    )
    return lines + marks + frame


def axis_names(across: str, up: str) -> str:
    """Name the two axes at their ends."""
    return (
        f'<text class="axis" x="100%" y="100%" dy="42" text-anchor="end">{across}</text>'
        f'<text class="axis" x="0" y="0" dx="-44" dy="-12">{up}</text>'
    )
