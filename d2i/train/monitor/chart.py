"""`loss.png`: a plot of the training and validation loss by step, made with Pillow."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from d2i.images.decode import png_bytes
from d2i.io import storage
from d2i.run_dir import read_metrics, read_validation

_SIZE = (960, 480)
_BOX = (80, 30, 940, 430)
_INK, _GRID, _TRAINING, _VALIDATION = "#222222", "#dddddd", "#3b6fb6", "#c8553d"
_NUM_TICKS = 5

Points = Sequence[tuple[float, float]]
Range = tuple[float, float]


def plot_losses(run_url: str) -> None:
    """Plot `loss.png` from the run's logs; do nothing before they hold two training losses."""
    training = [(float(line.step), line.loss) for line in read_metrics(run_url)]
    validation = [(float(line.step), line.loss) for line in read_validation(run_url)]
    if len(training) < 2:
        return
    image = Image.new("RGB", _SIZE, "white")
    canvas = ImageDraw.Draw(image)
    points = [*training, *validation]
    steps, losses = _range([step for step, _ in points]), _range([loss for _, loss in points])
    _plot_frame(canvas, steps, losses)
    _plot_line(canvas, training, steps, losses, _TRAINING)
    _plot_line(canvas, validation, steps, losses, _VALIDATION)
    _plot_legend(canvas, has_validation=bool(validation))
    storage.write_bytes(storage.join(run_url, "loss.png"), png_bytes(np.asarray(image)))


def _range(values: Sequence[float]) -> Range:
    low, high = min(values), max(values)
    margin = 0.02 * (high - low) or 0.05 * abs(high) or 1.0
    return low - margin, high + margin


def _position(point: tuple[float, float], steps: Range, losses: Range) -> tuple[float, float]:
    left, top, right, bottom = _BOX
    across = (point[0] - steps[0]) / (steps[1] - steps[0])
    up = (point[1] - losses[0]) / (losses[1] - losses[0])
    return left + across * (right - left), bottom - up * (bottom - top)


def _plot_frame(canvas: ImageDraw.ImageDraw, steps: Range, losses: Range) -> None:
    left, top, right, bottom = _BOX
    font = ImageFont.load_default(14)
    for number in range(_NUM_TICKS + 1):
        share = number / _NUM_TICKS
        loss = losses[0] + share * (losses[1] - losses[0])
        step = steps[0] + share * (steps[1] - steps[0])
        x, y = _position((step, loss), steps, losses)
        canvas.line((left, y, right, y), fill=_GRID)
        canvas.text((left - 8, y), f"{loss:.4g}", fill=_INK, font=font, anchor="rm")
        canvas.text((x, bottom + 8), f"{step:,.0f}", fill=_INK, font=font, anchor="ma")
    canvas.rectangle(_BOX, outline=_INK)
    canvas.text((right, bottom + 28), "step", fill=_INK, font=font, anchor="ra")
    canvas.text((left, top - 8), "loss", fill=_INK, font=font, anchor="ls")


def _plot_line(
    canvas: ImageDraw.ImageDraw, points: Points, steps: Range, losses: Range, colour: str
) -> None:
    positions = [_position(point, steps, losses) for point in points]
    if len(positions) > 1:
        canvas.line(positions, fill=colour, width=2)
    elif positions:
        x, y = positions[0]
        canvas.ellipse((x - 3, y - 3, x + 3, y + 3), fill=colour)


def _plot_legend(canvas: ImageDraw.ImageDraw, *, has_validation: bool) -> None:
    names = [("training", _TRAINING)] + [("validation", _VALIDATION)] * has_validation
    font = ImageFont.load_default(14)
    for number, (name, colour) in enumerate(names):
        x, y = _BOX[2] - 110, _BOX[1] + 14 + 20 * number
        canvas.line((x, y, x + 20, y), fill=colour, width=3)
        canvas.text((x + 26, y), name, fill=_INK, font=font, anchor="lm")
