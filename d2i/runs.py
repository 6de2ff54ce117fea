"""The run directory: its settings and metrics, written by training and read by evaluation.

Owns what a run refuses to go on with. Must not import torch.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from d2i import __version__
from d2i.config import Recipe, load_config
from d2i.errors import CheckpointError

CONFIG_NAME = "config.json"
EMA_NAME = "ema.safetensors"
METRICS_NAME = "metrics.jsonl"


@dataclass(frozen=True)
class RunConfig:
    """What a run is: kept as `config.json`, and compared when the command is repeated.

    Args:
        recipe: The resolved recipe, as JSON values.
        data: Folder of the training shards.
        manifest_sha256: Identity of that data set.
        world_size: Ranks the run was started with.
    """

    recipe: dict[str, Any]
    data: str
    manifest_sha256: str
    world_size: int
    d2i_version: str = __version__


@dataclass(frozen=True)
class MetricsLine:
    """One line of `metrics.jsonl`; `loss` is the mean over the steps since the line before."""

    step: int
    loss: float
    lr: float
    num_images: int
    images_per_s: float
    elapsed_s: float


def open_run(run_dir: Path, config: RunConfig) -> None:
    """Begin a run, or make sure that this is the same one.

    Raises:
        CheckpointError: If the run was started with another recipe or other data.
    """
    path = run_dir / CONFIG_NAME
    if not path.exists():
        run_dir.mkdir(parents=True, exist_ok=True)
        _write_whole(path, json.dumps(asdict(config), indent=1) + "\n")
        return
    there = json.loads(path.read_text())
    for name in ("recipe", "manifest_sha256"):
        if there[name] != getattr(config, name):
            raise CheckpointError(
                f"{run_dir} was started with another {name}: {_first_difference(there, config)}; "
                "expected the same; repeat it or choose another --run"
            )


def read_recipe(run_dir: Path) -> Recipe:
    """Return the recipe that a run was trained by.

    Raises:
        CheckpointError: If the folder is no run.
    """
    path = run_dir / CONFIG_NAME
    try:
        values = json.loads(path.read_text())["recipe"]
    except (OSError, ValueError, KeyError) as err:
        raise CheckpointError(
            f"{run_dir} is no run: {CONFIG_NAME} cannot be read; expected a folder made by "
            "d2i train"
        ) from err
    return load_config(Recipe, values, source=str(path))


@contextmanager
def only_writer(run_dir: Path) -> Iterator[None]:
    """Hold the run for one process; wait while ranks that outlived their launcher hold it."""
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def read_metrics(run_dir: Path) -> list[MetricsLine]:
    """Read `metrics.jsonl`; a line that was being written when the run was killed is left out."""
    path = run_dir / METRICS_NAME
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(MetricsLine(**json.loads(text)))
        except (ValueError, TypeError):
            continue
    return lines


def keep_metrics_until(run_dir: Path, step: int) -> None:
    """Drop the lines after a step, which the run is about to write anew."""
    kept = [json.dumps(asdict(line)) for line in read_metrics(run_dir) if line.step <= step]
    _write_whole(run_dir / METRICS_NAME, "".join(line + "\n" for line in kept))


def append_metrics(run_dir: Path, line: MetricsLine) -> None:
    """Append one line to `metrics.jsonl`."""
    with (run_dir / METRICS_NAME).open("a") as file:
        file.write(json.dumps(asdict(line)) + "\n")


def _first_difference(there: dict[str, Any], config: RunConfig) -> str:
    if there["manifest_sha256"] != config.manifest_sha256:
        return f"data {there['manifest_sha256'][:12]}, got {config.manifest_sha256[:12]}"
    for section, values in config.recipe.items():
        old = there["recipe"].get(section)
        if old != values:
            if isinstance(values, dict) and isinstance(old, dict):
                name = next(n for n in values if old.get(n) != values[n])
                return f"{section}.{name} was {old.get(name)!r}, got {values[name]!r}"
            return f"{section} was {old!r}, got {values!r}"
    return "a field was removed"


def _write_whole(path: Path, text: str) -> None:
    scratch = path.with_name(f".{path.name}.tmp")
    scratch.write_text(text)
    scratch.replace(path)
