"""The run directory: its settings and metrics, written by training and read by evaluation.

Owns what a run refuses to go on with. Must not import torch.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from d2i import __version__, storage
from d2i.config import Recipe, load_config
from d2i.errors import CheckpointError, ConfigError
from d2i.published import weights_to_fetch
from d2i.settle import settle

CONFIG_NAME = "config.json"
EMA_NAME = "ema.safetensors"
METRICS_NAME = "metrics.jsonl"
VALIDATION_NAME = "validation.jsonl"
# Written by a training that was asked to stop, and did.
STOPPED_NAME = "stopped.json"
BEST_NAME = "best.json"

# What decides where and in which pieces a step is computed, and what is kept of it, but no number
# beyond its rounding: as the number of ranks may, it may change from one command to the next.
_MAY_CHANGE = frozenset(
    f"recipe.train.{name}"
    for name in (
        "micro_batch_size",
        "zero_stage",
        "activation_checkpointing",
        "compile",
        "num_reader_threads",
        "num_checkpoint_steps",
        "num_checkpoints_kept",
        "num_log_steps",
        "num_validation_steps",
        "num_sample_steps",
        "record_keys",
        "wandb_project",
    )
)


@dataclass(frozen=True)
class RunConfig:
    """What a run is: kept as `config.json`, and compared when the command is repeated.

    Args:
        recipe: The resolved recipe, as JSON values.
        data: Folder of the training shards.
        manifest_sha256: Identity of that data set.
        world_size: Ranks the run was started with.
        initial_weights: The weights it started from, as `d2i.models.initial` describes them.
    """

    recipe: dict[str, Any]
    data: str
    manifest_sha256: str
    world_size: int
    initial_weights: dict[str, Any] | None = None
    d2i_version: str = __version__


@dataclass(frozen=True)
class MetricsLine:
    """One line of `metrics.jsonl`, about the steps since the line before.

    Args:
        step: Steps taken.
        loss: Mean over the steps.
        lr: Learning rate of the last step.
        num_images: Samples taken through the network since the start of the run.
        images_per_s: Over all ranks.
        elapsed_s: Seconds of training.
        data_wait: Share of the time that the first rank waited for data, 0 to 1.
        mfu: Share of the devices' peak FLOP/s, 0 to 1; None where the peak is not known.
    """

    step: int
    loss: float
    lr: float
    num_images: int
    images_per_s: float
    elapsed_s: float
    data_wait: float | None = None
    mfu: float | None = None


@dataclass(frozen=True)
class ValidationLine:
    """One line of `validation.jsonl`: the loss on fixed instances, noise and times.

    Args:
        step: Steps taken.
        loss: Mean over all instances.
        bands: Mean over those whose model time n lies in a band such as `1-250`.
    """

    step: int
    loss: float
    bands: dict[str, float]


def open_run(run_url: str, config: RunConfig, *, is_begun: bool) -> None:
    """Begin a run, or make sure that this is the same one.

    What changes no number may be another; `config.json` keeps what the run was begun with.

    Args:
        run_url: The run directory.
        config: What the run is.
        is_begun: Whether it has weights of its own; what has none may be begun with other settings.

    Raises:
        CheckpointError: If the run was started with another recipe or other data.
    """
    url = storage.join(run_url, CONFIG_NAME)
    if not is_begun:
        storage.remove(url)
    differences = [
        difference
        for difference in settle(url, asdict(config))
        if difference.startswith(("recipe.", "manifest_sha256:"))
        and difference.partition(":")[0] not in _MAY_CHANGE
    ]
    if differences:
        raise CheckpointError(
            f"{run_url} was started with another recipe or other data: got "
            f"{'; '.join(differences[:3])}; repeat that or choose another --run"
        )


def check_initial_weights(recipe: Recipe, run_url: str) -> None:
    """Make sure that a run is told what to start from; one made before this was asked goes on.

    Raises:
        ConfigError: If it is not: the published file, where it is published, and the setting.
    """
    if recipe.backbone.weights is not None:
        return
    if storage.exists(storage.join(run_url, CONFIG_NAME)):
        began_so = read_recipe(run_url).backbone.weights is None
        if began_so:
            return
    raise ConfigError(
        f"recipe {recipe.name}: got no backbone.weights; expected what to fine-tune, "
        f"{weights_to_fetch(recipe.backbone.name)}; give --set backbone.weights=PATH, or "
        "backbone.weights=scratch to train from random weights"
    )


def read_recipe(run_url: str) -> Recipe:
    """Return the recipe that a run was trained by.

    Raises:
        CheckpointError: If the folder is no run.
    """
    url = storage.join(run_url, CONFIG_NAME)
    try:
        values = json.loads(storage.read_bytes(url))["recipe"]
    except (OSError, ValueError, KeyError, TypeError) as err:
        raise CheckpointError(
            f"{run_url} is no run: {CONFIG_NAME} cannot be read; expected a folder made by "
            "d2i train"
        ) from err
    return load_config(Recipe, values, source=url)


def read_metrics(run_url: str) -> list[MetricsLine]:
    """Read `metrics.jsonl`; a line that was being written when the run was killed is left out."""
    return _read_lines(storage.join(run_url, METRICS_NAME), MetricsLine)


def read_validation(run_url: str) -> list[ValidationLine]:
    """Read `validation.jsonl`, as `read_metrics` does."""
    return _read_lines(storage.join(run_url, VALIDATION_NAME), ValidationLine)


def keep_lines_until(run_url: str, step: int) -> None:
    """Drop the lines after a step, which the run is about to write anew."""
    for name, lines in (
        (METRICS_NAME, read_metrics(run_url)),
        (VALIDATION_NAME, read_validation(run_url)),
    ):
        kept = "".join(_as_line(line) for line in lines if line.step <= step)
        storage.write_bytes(storage.join(run_url, name), kept.encode())


def append_line(run_url: str, line: MetricsLine | ValidationLine) -> None:
    """Append one line to `metrics.jsonl` or `validation.jsonl`."""
    name = METRICS_NAME if isinstance(line, MetricsLine) else VALIDATION_NAME
    storage.append_bytes(storage.join(run_url, name), _as_line(line).encode())


def _as_line(line: MetricsLine | ValidationLine) -> str:
    return json.dumps(asdict(line)) + "\n"


LineT = TypeVar("LineT", MetricsLine, ValidationLine)


def _read_lines(url: str, kind: type[LineT]) -> list[LineT]:
    lines = []
    for text in storage.read_bytes(url).splitlines() if storage.exists(url) else []:
        try:
            lines.append(kind(**json.loads(text)))
        except (ValueError, TypeError):
            continue
    return lines


def best_choice(run_url: str) -> tuple[str, float] | None:
    """Return the weights and the guidance scale that `d2i select` chose for a run, if it did.

    Raises:
        ConfigError: If what it wrote is damaged, or the weights are gone.
    """
    url = storage.join(run_url, BEST_NAME)
    if not storage.exists(url):
        return None
    try:
        best = json.loads(storage.read_bytes(url))
        weights, scale = storage.join(run_url, best["weights"]), float(best["guidance_scale"])
    except (ValueError, KeyError, TypeError, AttributeError) as err:
        raise ConfigError(f"{url} is damaged: {err}; repeat d2i select, or delete it") from err
    if not storage.exists(weights):
        raise ConfigError(f"{url} names {weights}, which is gone; repeat d2i select")
    return weights, scale
