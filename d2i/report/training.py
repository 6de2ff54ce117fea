"""The loss curve of each run, plotted as SVG from its metrics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from d2i.io import storage
from d2i.report.evaluation import Evaluation, read_json
from d2i.report.html import OmittedSection, Section, duration, figure, is_number, text
from d2i.report.svg import Box, axes, axis_names, ticks
from d2i.run_dir import CONFIG_NAME, METRICS_NAME, read_log

_TITLE = "Training"
_MAX_POINTS = 1000
_SMOOTHED_SHARE = 25


@dataclass(frozen=True)
class Run:
    """Output of training: its settings, and the lines of its metrics with a finite loss."""

    url: str
    config: dict[str, Any]
    lines: list[dict[str, Any]]


def training_section(evaluations: Sequence[Evaluation]) -> Section | OmittedSection:
    """Plot the loss of every run that was evaluated."""
    urls = list(dict.fromkeys(str(e.card["run"]) for e in evaluations if e.card.get("run")))
    if not urls:
        return OmittedSection(_TITLE, "no evaluated system is a run")
    parts = []
    for url in urls:
        if storage.names_host(url):
            parts.append(
                _left_out(
                    f"the metric card's run {text(url)} is a URL with a host, which a report does "
                    "not contact"
                )
            )
            continue
        run = read_run(url)
        parts.append(_run_part(run) if len(run.lines) > 1 else _no_lines(url))
    return Section("training", _TITLE, "".join(parts))


def read_run(url: str) -> Run:
    """Read a run; skip a line without a finite loss, or truncated when the run was killed.

    Raises:
        DataError: If `config.json` or a line is damaged.
    """
    usable = filter(_is_usable, read_log(storage.join(url, METRICS_NAME)))
    # A resumed run writes some steps again: the later line wins.
    lines = {line["step"]: line for line in usable}
    ordered = [lines[step] for step in sorted(lines)]
    return Run(url, read_json(storage.join(url, CONFIG_NAME)) or {}, ordered)


def _is_usable(line: dict[str, Any]) -> bool:
    return all(is_number(line.get(name)) for name in ("step", "loss"))


def smooth(values: Sequence[float]) -> list[float]:
    """Return the mean over a window centred on each value, 1/25 of the curve to either side."""
    half = max(1, len(values) // _SMOOTHED_SHARE)
    windows = (values[max(0, n - half) : n + half + 1] for n in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def _no_lines(url: str) -> str:
    return _left_out(f"{METRICS_NAME} of {text(url)} has fewer than two steps")


def _left_out(reason: str) -> str:
    return f'<p class="left-out"><strong>Loss curve</strong> omitted: {reason}.</p>'


def _run_part(run: Run) -> str:
    every = math.ceil(len(run.lines) / _MAX_POINTS)
    shown = run.lines[::every]
    points = [(float(line["step"]), float(line["loss"])) for line in shown]
    thinned = f" One logged step in {every} is plotted." if every > 1 else ""
    return (
        f'<p class="intro">{_facts(run)}</p><figure class="chart">{_svg(points)}<figcaption>'
        f'<ul class="legend"><li><i class="swatch raw"></i>loss as logged</li>'
        f'<li><i class="swatch smoothed"></i>moving average</li></ul>'
        f"Training loss by step, of the raw weights and not of their EMA.{thinned}"
        f"</figcaption></figure>"
    )


def _facts(run: Run) -> str:
    first, last = run.lines[0], run.lines[-1]
    recipe = run.config.get("recipe") or {}
    train = recipe.get("train") or {}
    facts = [f"<strong>{text(recipe['name'])}</strong>"] if "name" in recipe else []
    facts.append(f"{figure(last['step'], ',')} steps")
    if is_number(train.get("global_batch_size")):
        facts.append(f"{figure(train['global_batch_size'], ',')} images per step")
    if is_number(run.config.get("world_size")):
        facts.append(f"{figure(run.config['world_size'], ',')} ranks")
    if is_number(last.get("elapsed_s")):
        facts.append(duration(last["elapsed_s"]))
    if is_number(last.get("images_per_s")):
        facts.append(f"{figure(last['images_per_s'], ',.1f')} images/s")
    losses = f"loss from {figure(first['loss'], '.4g')} to {figure(last['loss'], '.4g')}"
    return f"{' · '.join(facts)} · {losses} as logged"


def _svg(points: Sequence[tuple[float, float]]) -> str:
    """Render the lines in a stretched inner SVG, and axes and labels around it in real pixels."""
    steps, losses = [step for step, _ in points], [loss for _, loss in points]
    low, high = min(losses), max(losses)
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    box = (min(steps), max(steps), low - margin, high + margin)
    raw = _polyline(list(zip(steps, losses, strict=True)), box, "raw")
    smoothed = _polyline(list(zip(steps, smooth(losses), strict=True)), box, "smoothed")
    frame = axes(
        box,
        {value: f"{value:,.0f}" for value in ticks(box[0], box[1], 6)},
        {value: f"{value:.4g}" for value in ticks(box[2], box[3])},
    )
    label = f"Loss over {len(points)} logged steps, between {low:.4g} and {high:.4g}"
    return (
        f'<svg class="loss" role="img" aria-label="{label}" width="100%" height="300">'
        f'{frame}<svg x="0" y="0" width="100%" height="100%" viewBox="0 0 1000 1000" '
        f'preserveAspectRatio="none">{raw}{smoothed}</svg>'
        f"{axis_names('step', 'loss')}</svg>"
    )


def _polyline(points: Sequence[tuple[float, float]], box: Box, kind: str) -> str:
    left, right, low, high = box
    width = (right - left) or 1.0
    path = " ".join(
        f"{1000 * (x - left) / width:.1f},{1000 * (high - y) / (high - low):.1f}" for x, y in points
    )
    return f'<polyline class="{kind}" vector-effect="non-scaling-stroke" points="{path}"/>'
