"""The run directory: its settings and metrics, written by training and read by evaluation.

Decides which changed settings a run refuses to resume with. Must not import torch.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from d2i import __version__
from d2i.backbones import presets_of
from d2i.config import LEGACY_DEFAULTS, Recipe, WeightsKind, load_config
from d2i.errors import CheckpointError, ConfigError
from d2i.io import checksums, storage
from d2i.io.checksums import CRC_FIELD, has_crc32, json_line, say_not_verified
from d2i.io.config_lock import lock_or_diff, read_settings, with_legacy_defaults
from d2i.io.parse import damaged, parse_json, read_json
from d2i.weights_catalog import weights_to_fetch

CONFIG_NAME = "config.json"
EMA_NAME = "ema.safetensors"
# The weights of a finished run, by kind. The EMA is written last: its step is the run's.
RESULT_NAMES: dict[WeightsKind, str] = {
    "ema": EMA_NAME,
    "ema-short": "ema-short.safetensors",
    "trained": "trained.safetensors",
}
# The end of their directory's name, where each has its own.
_SUFFIXES: dict[WeightsKind, str] = {"ema": "", "ema-short": "-ema-short", "trained": "-trained"}
_ADAPTER_NAME = "pytorch_lora_weights.safetensors"
_NETWORK_NAME = "diffusion_pytorch_model.safetensors"
# A finished run has one of these.
_EMA_NAMES = (
    EMA_NAME,
    f"adapter/{_ADAPTER_NAME}",
    f"unet/{_NETWORK_NAME}",
    f"transformer/{_NETWORK_NAME}",
)
METRICS_NAME = "metrics.jsonl"
VALIDATION_NAME = "validation.jsonl"
# Written by a training that stopped on request.
STOPPED_NAME = "stopped.json"
BEST_NAME = "best.json"

_SELECT_AGAIN = "repeat d2i select, or delete it"
_TRAIN_AGAIN = (
    "delete it and repeat that d2i train command, which rewrites it from the last checkpoint"
)
_EDIT_LOG = "delete that line, or restore the file"
_END_OF_LINE = re.compile(rb'"crc32": \d+\}')
# The part of the crc32 field that is left in any line with one changed byte.
_TRACE_OF_CRC = re.compile(rb'"cr|c32"')

_FORMERLY = {f"recipe.{path}": value for path, value in LEGACY_DEFAULTS.items()}
# Before adapters a recipe had no such group.
_FORMERLY["recipe.adapter"] = {"kind": None, "rank": 16, "alpha": 16, "targets": None}
# Settings that decide how far a run goes, where and in which pieces a step is computed, and what is
# kept of it, but no number beyond its rounding: like the number of ranks, they may change from one
# command to the next.
_RESUME_MUTABLE = frozenset(
    f"recipe.train.{name}"
    for name in (
        "num_steps",
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
    """The identity of a run: stored as `config.json`, and compared when the command is repeated.

    Args:
        recipe: The resolved recipe, as JSON values.
        data: Directory of the training shards.
        manifest_sha256: Identity of that data set.
        world_size: Ranks the run was started with.
        initial_weights: The weights it started from, as `d2i.models.weights.initial` describes
            them.
    """

    recipe: dict[str, Any]
    data: str
    manifest_sha256: str
    world_size: int
    initial_weights: dict[str, Any] | None = None
    d2i_version: str = __version__


@dataclass(frozen=True)
class MetricsLine:
    """One line of `metrics.jsonl`, about the steps since the line before, of the trained weights.

    Args:
        step: Steps taken.
        loss: Mean over the steps.
        lr: Learning rate of the last step.
        num_images: Samples processed by the network since the start of the run.
        images_per_s: Over all ranks.
        elapsed_s: Seconds of training.
        data_wait: Share of the time that the first rank waited for data, 0 to 1.
        mfu: Share of the devices' peak FLOP/s, 0 to 1; None if the peak is unknown.
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
    """One line of `validation.jsonl`: the trained weights' loss on fixed instances, noise, times.

    Args:
        step: Steps taken.
        loss: Mean over all instances.
        bands: Mean over those whose model time n lies in a band such as `1-250`.
    """

    step: int
    loss: float
    bands: dict[str, float]


def result_names(recipe: Recipe) -> dict[WeightsKind, str]:
    """Return the files of a finished run's weights by kind, relative to the run.

    They are where the programs that read them look: a network of d2i's own in one file, an adapter
    in the directory that a pipeline of diffusers loads it from, and a pipeline's network as its
    `save_pretrained` lays it out.
    """
    presets = presets_of(recipe.backbone.name)
    if recipe.adapter.kind:
        return {kind: f"adapter{end}/{_ADAPTER_NAME}" for kind, end in _SUFFIXES.items()}
    if presets.pipeline:
        part = presets.network_part
        return {kind: f"{part}{end}/{_NETWORK_NAME}" for kind, end in _SUFFIXES.items()}
    return RESULT_NAMES


def start_or_resume(run_url: str, config: RunConfig, *, is_begun: bool) -> None:
    """Start a run, or check that this is the same one.

    Settings that change no number may differ; `config.json` keeps those that the run started with.

    Args:
        run_url: The run directory.
        config: The identity of the run.
        is_begun: True if it has weights of its own; without any, it may start with other settings.

    Raises:
        CheckpointError: If the run was started with another recipe or other data.
    """
    url = storage.join(run_url, CONFIG_NAME)
    if not is_begun:
        checksums.remove(url)
    named = [
        difference
        for difference in lock_or_diff(url, asdict(config), _as_now)
        if difference.startswith(("recipe.", "manifest_sha256:"))
        and difference.partition(":")[0] not in _RESUME_MUTABLE
    ]
    if named:
        raise CheckpointError(
            f"{run_url} was started with another recipe or other data: got "
            f"{'; '.join(named[:3])}; use the original ones{_settings_of(named)} or choose another "
            "--run"
        )


def check_initial_weights(recipe: Recipe, run_url: str) -> None:
    """Check that the initial weights of a run are set; a run from before this check may go on.

    Raises:
        ConfigError: If they are not; it names the published file, its source, and the setting.
    """
    if recipe.backbone.weights is not None:
        return
    if storage.exists(storage.join(run_url, CONFIG_NAME)):
        began_so = read_recipe(run_url).backbone.weights is None
        if began_so:
            return
    raise ConfigError(
        f"recipe {recipe.name}: got no backbone.weights; expected the weights to fine-tune, "
        f"{weights_to_fetch(recipe.backbone.name)}; give --set backbone.weights=PATH, or "
        "backbone.weights=scratch to train from random weights"
    )


def _as_now(config: dict[str, Any]) -> dict[str, Any]:
    """Convert a run's stored config to the current settings.

    Before averages had a warm-up, bf16 and fp16 meant the whole network in half precision.
    """
    begun = with_legacy_defaults(config, _FORMERLY)
    train = (config.get("recipe") or {}).get("train") or {}
    if "ema_warmup" not in train and train.get("precision") in ("bf16", "fp16"):
        begun["recipe"]["train"]["precision"] = f"{train['precision']}_weights"
    return begun


def _settings_of(named: Sequence[str]) -> str:
    """Return the `--set` options that restore a run's original value of each differing setting."""
    found = [re.fullmatch(r"recipe\.([\w.]+): .*, expected ([\w.+-]+)", line) for line in named]
    words = {"True": "true", "False": "false", "None": "null"}
    options = [f"--set {m[1]}={words.get(m[2], m[2])}" for m in found if m]
    return f" ({' '.join(options)})" if options else ""


def read_recipe(run_url: str) -> Recipe:
    """Return the recipe that a run was trained with.

    Raises:
        CheckpointError: If the directory is not a run.
    """
    url = storage.join(run_url, CONFIG_NAME)
    recipe = read_run_config(run_url).get("recipe")
    if not isinstance(recipe, dict):
        raise _no_run(run_url)
    return load_config(Recipe, with_legacy_defaults(recipe, LEGACY_DEFAULTS), source=url)


def read_run_config(run_url: str) -> dict[str, Any]:
    """Return a run's `config.json`, with the fields of `RunConfig`; older runs have fewer.

    Raises:
        CheckpointError: If the directory is not a run, or the file is damaged.
    """
    try:
        return read_settings(storage.join(run_url, CONFIG_NAME), CheckpointError)
    except OSError as err:
        raise _no_run(run_url) from err


def _no_run(run_url: str) -> CheckpointError:
    return CheckpointError(
        f"{run_url} is not a run: {CONFIG_NAME} cannot be read; expected a directory made by d2i "
        "train"
    )


def read_metrics(run_url: str) -> list[MetricsLine]:
    """Read `metrics.jsonl`; a line that was being written when the run was killed is skipped."""
    return _read_lines(storage.join(run_url, METRICS_NAME), MetricsLine)


def read_validation(run_url: str) -> list[ValidationLine]:
    """Read `validation.jsonl`, as `read_metrics` does."""
    return _read_lines(storage.join(run_url, VALIDATION_NAME), ValidationLine)


def truncate_logs_after(run_url: str, step: int, validation_step: int | None = None) -> None:
    """Drop the lines after a step, which the run is about to write again.

    Args:
        run_url: The run directory.
        step: The last step whose line is kept.
        validation_step: The same for `validation.jsonl`; `None` is `step`.
    """
    last = step if validation_step is None else validation_step
    for name, lines, kept_until in (
        (METRICS_NAME, read_metrics(run_url), step),
        (VALIDATION_NAME, read_validation(run_url), last),
    ):
        kept = [json_line(asdict(line)) for line in lines if line.step <= kept_until]
        storage.write_bytes(storage.join(run_url, name), b"".join(kept))


def append_line(run_url: str, line: MetricsLine | ValidationLine) -> None:
    """Append one line to `metrics.jsonl` or `validation.jsonl`."""
    name = METRICS_NAME if isinstance(line, MetricsLine) else VALIDATION_NAME
    storage.append_bytes(storage.join(run_url, name), json_line(asdict(line)))


LineT = TypeVar("LineT", MetricsLine, ValidationLine)


def _read_lines(url: str, kind: type[LineT]) -> list[LineT]:
    lines = []
    for values in read_log(url):
        with contextlib.suppress(TypeError):
            lines.append(kind(**values))
    return lines


def read_log(url: str) -> list[dict[str, Any]]:
    """Read a log of JSON lines that training wrote; empty if there is none.

    A last line without its end was being written when the run was killed, and is skipped; in a run
    from before lines had a crc32, so is any other line that cannot be read.

    Raises:
        DataError: If another line is damaged.
    """
    data = storage.read_bytes(url) if storage.exists(url) else b""
    *lines, last = data.split(b"\n")
    is_summed = _TRACE_OF_CRC.search(data) is not None
    if lines and not is_summed:
        say_not_verified(url, "its lines")
    if _END_OF_LINE.search(last) or (last and not is_summed):
        lines.append(last)
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            values = json.loads(line)
            is_good = isinstance(values, dict) and (has_crc32(values) or not is_summed)
        except (ValueError, RecursionError):
            is_good = False
        if is_good:
            found.append({name: v for name, v in values.items() if name != CRC_FIELD})
        elif is_summed:
            raise damaged(url, f"line {number} is damaged", next_step=_EDIT_LOG)
    return found


def last_step(run_url: str, recipe: Recipe | None = None) -> int | None:
    """Return the step after which a run's results were written; None if there are none yet.

    Args:
        run_url: The run directory.
        recipe: Of the run, if it is known: then only its own results are looked for.

    Raises:
        CheckpointError: If the results cannot be read.
    """
    names = [result_names(recipe)["ema"]] if recipe else _EMA_NAMES
    places = (storage.join(run_url, name) for name in names)
    url = next((place for place in places if storage.exists(place)), None)
    if url is None:
        return None
    step = result_step(url)
    # The run may have finished before results recorded their step.
    return read_recipe(run_url).train.num_steps if step is None else step


def result_step(url: str) -> int | None:
    """Return the step after which a file of weights was written; None if it does not record it.

    Raises:
        CheckpointError: If the file cannot be read, or is damaged.
    """
    refused: dict[str, Any] = {"next_step": _TRAIN_AGAIN, "error": CheckpointError}
    if storage.local_path(url) is not None:
        # Of a remote file only the header is read here; it is read whole once it is fetched.
        checksums.check_file(url, **refused)
    try:
        length = int.from_bytes(storage.read_range(url, 0, 8), "little")
        header = storage.read_range(url, 8, min(length, storage.size_bytes(url)))
        described = parse_json(header, url, **refused).get("__metadata__", {})
        return int(described["step"]) if "step" in described else None
    except (OSError, ValueError, TypeError) as err:
        raise damaged(url, err, "weights that d2i train wrote", **refused) from err


def keep_num_steps(run_url: str, num_steps: int) -> None:
    """Record in `config.json` the number of steps of a run that is finished now."""
    url = storage.join(run_url, CONFIG_NAME)
    config = read_run_config(run_url)
    if config["recipe"]["train"]["num_steps"] != num_steps:
        config["recipe"]["train"]["num_steps"] = num_steps
        checksums.write_bytes(url, (json.dumps(config, indent=1, sort_keys=True) + "\n").encode())


@dataclass(frozen=True)
class BestChoice:
    """The choice of `d2i select` for a run.

    Args:
        weights: URL of the file.
        weights_kind: Their kind.
        guidance_scale: The scale to generate with.
        last_step: The run's last step at the time of the choice.
    """

    weights: str
    weights_kind: WeightsKind
    guidance_scale: float
    last_step: int

    def settings(self) -> list[str]:
        """Return the choice as settings, which others may override."""
        return [
            f"sample.guidance_scale={self.guidance_scale}",
            f"sample.weights={self.weights_kind}",
        ]


def load_selection(run_url: str, warn: Callable[[str], None] | None = None) -> BestChoice | None:
    """Return the choice of `d2i select` for a run; None if there is none as new as the run.

    Args:
        run_url: The run directory.
        warn: Called with a line about a choice that is older than the run's results, so not used.

    Raises:
        ConfigError: If `best.json` is damaged, or the weights are gone.
    """
    url = storage.join(run_url, BEST_NAME)
    if not storage.exists(url):
        return None
    best = _read_best(url, run_url)
    trained_to = last_step(run_url)
    if trained_to is not None and best.last_step < trained_to:
        if warn:
            warn(
                f"{url} is not used: it was chosen when the run had {best.last_step} steps, and it "
                f"has {trained_to} now; repeat d2i select"
            )
        return None
    if not storage.exists(best.weights):
        raise ConfigError(f"{url} names {best.weights}, which is gone; repeat d2i select")
    return best


def _read_best(url: str, run_url: str) -> BestChoice:
    best = read_choice(run_url)
    try:
        # Older files have no `last_step`: their candidates include the last checkpoint.
        steps = [int(candidate["step"]) for candidate in best.get("candidates", ())]
        return BestChoice(
            weights=storage.join(run_url, best["weights"]),
            weights_kind=best.get("weights_kind", "ema"),
            guidance_scale=float(best["guidance_scale"]),
            last_step=int(best.get("last_step", max([*steps, int(best.get("step", 0))]))),
        )
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as err:
        raise damaged(url, repr(err), next_step=_SELECT_AGAIN, error=ConfigError) from err


def read_choice(directory: str) -> dict[str, Any]:
    """Return the `best.json` that `d2i select` wrote into a directory.

    Raises:
        FileNotFoundError: If there is none.
        ConfigError: If it is damaged.
    """
    url = storage.join(directory, BEST_NAME)
    return read_json(url, next_step=_SELECT_AGAIN, error=ConfigError)
