"""The training and validation loss of each run, plotted from its logs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from d2i.io import storage
from d2i.report.document import OmittedSection, Section
from d2i.report.evaluation import Evaluation, read_json
from d2i.report.svg import line_chart
from d2i.report.table import is_number
from d2i.run_dir import CONFIG_NAME, METRICS_NAME, VALIDATION_NAME, read_log

_TITLE = "Training"
_MAX_POINTS = 1000
_SMOOTHED_SHARE = 25


@dataclass(frozen=True)
class Run:
    """Output of training: its settings, and the lines of its logs with a finite loss."""

    url: str
    config: dict[str, Any]
    lines: list[dict[str, Any]]
    validation: list[dict[str, Any]]


def training_section(evaluations: Sequence[Evaluation]) -> Section | OmittedSection:
    """Plot the losses of every run that was evaluated."""
    urls = list(dict.fromkeys(str(e.card["run"]) for e in evaluations if e.card.get("run")))
    if not urls:
        return OmittedSection(_TITLE, "no evaluated system is a run")
    parts = [_part(url) for url in urls]
    reasons = [part["reason"] for part in parts if "reason" in part]
    if len(reasons) == len(parts):
        return OmittedSection(_TITLE, "; ".join(reasons))
    return Section("training", _TITLE, "training.html", {"runs": parts})


def read_run(url: str) -> Run:
    """Read a run; skip a line without a finite loss, or truncated when the run was killed.

    Raises:
        DataError: If `config.json` or a line is damaged.
    """
    config = read_json(storage.join(url, CONFIG_NAME)) or {}
    return Run(url, config, _lines(url, METRICS_NAME), _lines(url, VALIDATION_NAME))


def smooth(values: Sequence[float]) -> list[float]:
    """Return the mean over a window centred on each value, 1/25 of the curve to either side."""
    half = max(1, len(values) // _SMOOTHED_SHARE)
    windows = (values[max(0, n - half) : n + half + 1] for n in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def _lines(url: str, name: str) -> list[dict[str, Any]]:
    usable = filter(_is_usable, read_log(storage.join(url, name)))
    # A resumed run writes some steps again: the later line wins.
    lines = {line["step"]: line for line in usable}
    return [lines[step] for step in sorted(lines)]


def _is_usable(line: dict[str, Any]) -> bool:
    return all(is_number(line.get(name)) for name in ("step", "loss"))


def _part(url: str) -> dict[str, Any]:
    """Return what the page shows of a run, or the `reason` why it shows nothing."""
    if storage.names_host(url):
        return {
            "reason": f"the metric card's run {url} is a URL with a host, which a report does not "
            "contact"
        }
    run = read_run(url)
    if len(run.lines) < 2:
        return {"reason": f"{METRICS_NAME} of {url} has fewer than two steps"}
    every = math.ceil(len(run.lines) / _MAX_POINTS)
    raw, validation = _points(run.lines[::every]), _points(run.validation)
    losses = [loss for _, loss in raw]
    steps = [step for step, _ in raw]
    lines = {"raw": raw, "smoothed": list(zip(steps, smooth(losses), strict=True))}
    if validation:
        lines["validation"] = validation
    title = f"Loss over {len(raw)} logged steps, between {min(losses):.4g} and {max(losses):.4g}"
    recipe = run.config.get("recipe") or {}
    return {
        "name": recipe.get("name"),
        "facts": _facts(run, recipe.get("train") or {}),
        "first": run.lines[0],
        "last": run.lines[-1],
        "validation": run.validation,
        "every": every,
        "chart": line_chart(title, ("step", "loss"), lines, dotted="validation"),
    }


def _points(lines: Sequence[dict[str, Any]]) -> list[tuple[float, float]]:
    return [(float(line["step"]), float(line["loss"])) for line in lines]


def _facts(run: Run, train: dict[str, Any]) -> list[tuple[float, str, str]]:
    """Return the recorded facts of a run: value, format, and the words after it."""
    last = run.lines[-1]
    facts = [
        (last["step"], ",", " steps"),
        (train.get("global_batch_size"), ",", " images per step"),
        (run.config.get("world_size"), ",", " ranks"),
        (last.get("elapsed_s"), "duration", ""),
        (last.get("images_per_s"), ",.1f", " images/s"),
    ]
    return [(value, spec, words) for value, spec, words in facts if is_number(value)]
