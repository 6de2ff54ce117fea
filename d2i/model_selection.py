"""Model selection on validation dialogs (`d2i select`): a run's best weights, the best guidance.

Every side of a comparison has its guidance selected in the same way, as guidance moves FID more
than fine-tuning does. Everything is stored in `RUN/select`, or in `--out` for any other system: a
seeded part of the validation split as its own data set, the weights of each candidate, and its
evaluation, so that a repeated command generates only what is missing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from d2i.cluster import Session
from d2i.config import ImageConfig, Recipe, WeightsKind, apply_settings
from d2i.errors import CheckpointError, ConfigError, DataError
from d2i.eval.generation_settings import generation_weights
from d2i.eval.job import EvalProgress, evaluate
from d2i.eval.request import EvalRequest
from d2i.eval.system import SystemSpec
from d2i.eval.systems import parse_system
from d2i.images.decode import decode_image
from d2i.io import checksums, storage
from d2i.io.config_lock import lock_or_diff
from d2i.metric_specs import METRICS, MetricSpec
from d2i.recipes import change_recipe, read_stored_recipe, refuse_host
from d2i.run_dir import BEST_NAME, last_step, read_recipe, read_run_config
from d2i.shards import (
    Sample,
    ShardReader,
    json_bytes,
    npy_bytes,
    split_url,
    write_manifest,
    write_shard,
)
from d2i.train.checkpoint.checkpoint_files import (
    KIND_OF_WEIGHTS,
    Checkpoint,
    complete_checkpoints,
    step_of,
)
from d2i.train.monitor.validation import choose_instances
from d2i.train.results import save_trained


@dataclass(frozen=True)
class SelectRequest:
    """The candidates to compare, and the metric.

    Args:
        system: As `d2i eval --system` takes it: `run:DIR`, a backbone's name or `diffusers:PATH`.
        weights: Of a published backbone.
        adapter: A LoRA on a `diffusers:` system.
        data_url: Directory made by d2i preprocess, with a validation split; for a run, its own by
            default.
        out_url: Directory of `best.json` and everything else; a run uses its own.
        guidance_scales: Scales to try; if empty, the recipe's own.
        metric: The metric that decides, a key of `d2i.metric_specs.METRICS`.
        num_instances: Maximum size of the validation subset.
        seed: Seed that chooses the subset.
        settings: `--set` of the recipe, such as `sample.num_steps=20`.
    """

    system: str
    weights: str | None = None
    adapter: str | None = None
    data_url: str | None = None
    out_url: str | None = None
    guidance_scales: Sequence[float] = ()
    metric: str = "fid"
    num_instances: int = 1000
    seed: int = 0
    settings: Sequence[str] = ()


@dataclass(frozen=True)
class _Candidate:
    """One evaluation of many: the system, its settings, and its fields in `best.json`."""

    name: str
    spec: SystemSpec
    settings: Sequence[str]
    details: Mapping[str, Any]


def select(
    request: SelectRequest, session: Session, on_progress: Callable[[str, EvalProgress], None]
) -> dict[str, Any]:
    """Score every candidate, and write `best.json` into the run, or into `out_url`.

    Returns:
        Its content: `guidance_scale`, `metric`, `value`, `num_instances`, `seed`, and `candidates`
        with all of their scores; for a run `weights` (relative to it), `weights_kind`, `step` and
        `last_step` (of the run); for any other system `system` and the `settings` of the choice.

    Raises:
        CheckpointError: If the run has no complete checkpoint.
        ConfigError: If the metric is not in `METRICS`, or was not scored, or the system has no
            guidance to select.
        DataError: If its data has no validation split.
    """
    if request.metric not in METRICS:
        raise ConfigError(f"--metric: got {request.metric!r}; expected one of {', '.join(METRICS)}")
    kind, _, run_url = request.system.partition(":")
    search = _of_run(request, run_url) if kind == "run" else _of_system(request)
    subset = _write_subset(request, search.data_url, search.directory)
    candidates = [
        _score(session, search.recipe, candidate, subset, on_progress)
        for candidate in search.candidates
    ]
    best = _best(candidates, METRICS[request.metric])
    result = {name: value for name, value in best.items() if name != "scores"} | {
        **search.details,
        "metric": request.metric,
        "value": best["scores"][request.metric],
        "num_instances": len(ShardReader(storage.join(subset, "data"))),
        "seed": request.seed,
        "candidates": candidates,
    }
    data = json.dumps(result, indent=1, sort_keys=True) + "\n"
    checksums.write_bytes(search.best_url, data.encode())
    return result


@dataclass(frozen=True)
class _Search:
    """The candidates, their data, and the directory of the results."""

    recipe: Recipe
    data_url: str
    directory: str
    best_url: str
    candidates: Sequence[_Candidate]
    details: Mapping[str, Any]


def _of_run(request: SelectRequest, run_url: str) -> _Search:
    """Try every kind of weights of each checkpoint with each guidance scale."""
    run_url = storage.resolve(run_url)
    recipe = change_recipe(read_recipe(run_url), request.settings)
    checkpoints = complete_checkpoints(run_url)
    if not checkpoints:
        raise CheckpointError(
            f"{run_url} has no complete checkpoint; expected at least one; repeat its d2i train "
            "command"
        )
    kinds = [k for k in KIND_OF_WEIGHTS if k != "ema-short" or recipe.train.short_ema_length]
    return _Search(
        recipe=recipe,
        data_url=request.data_url or _trained_on(run_url),
        directory=storage.join(run_url, "select"),
        best_url=storage.join(run_url, BEST_NAME),
        candidates=[
            _candidate_of_run(run_url, recipe, checkpoint, kind, scale)
            for checkpoint in checkpoints
            for kind in kinds
            for scale in request.guidance_scales or (recipe.sample.guidance_scale,)
        ],
        details={"last_step": max(step_of(checkpoints[-1]), last_step(run_url) or 0)},
    )


def _trained_on(run_url: str) -> str:
    """Return the directory of a run's own data.

    Raises:
        ConfigError: If that is a URL with a host, which is accepted only in the command.
    """
    data_url = str(read_run_config(run_url)["data"])
    refuse_host(f"the data of {run_url}", data_url, "--data URL")
    return data_url


def _candidate_of_run(
    run_url: str, recipe: Recipe, directory: str, kind: WeightsKind, scale: float
) -> _Candidate:
    step, marked = step_of(directory), "" if kind == "ema" else f"-{kind}"
    kept = f"select/step-{step}{marked}.safetensors"
    weights = storage.join(run_url, kept)
    if not storage.exists(weights):
        checkpoint = Checkpoint(directory)
        checkpoint.check()
        save_trained(recipe, checkpoint, kind, weights)
    backbone = recipe.backbone.model_copy(update={"weights": weights})
    label = f"step-{step}, {kind}, guidance {scale:g}"
    return _Candidate(
        f"step-{step}{marked}-guidance-{scale:g}",
        SystemSpec(f"run:{run_url}", label, backbone),
        [f"sample.guidance_scale={scale}", f"sample.weights={kind}"],
        {"weights": kept, "weights_kind": kind, "step": step, "guidance_scale": scale},
    )


def _of_system(request: SelectRequest) -> _Search:
    """Try each guidance scale of a published backbone or a `diffusers:` pipeline."""
    if request.data_url is None or request.out_url is None:
        raise ConfigError(
            f"--system {request.system}: got no --data or no --out; expected both, as only a run "
            "has its own; give both"
        )
    recipe = change_recipe(read_stored_recipe(request.data_url), request.settings)
    spec = parse_system(request.system, request.weights, recipe, request.adapter)
    if spec.network is None and spec.kind != "diffusers":
        raise ConfigError(
            f"--system {request.system}: has no guidance scale to select; expected run:DIR, a "
            "backbone with --weights, or diffusers:PATH"
        )
    if not request.guidance_scales:
        raise ConfigError(
            f"--system {request.system}: got no --guidance; expected the scales to try; give "
            "--guidance SCALE, once for each"
        )
    candidates = []
    for scale in request.guidance_scales:
        settings = _guided(recipe, scale, is_pipeline=spec.network is None)
        details = {
            "system": spec.name,
            **generation_weights(request.weights, request.adapter),
            "guidance_scale": scale,
            "settings": settings,
        }
        candidates.append(_Candidate(f"guidance-{scale:g}", spec, settings, details))
    out_url = storage.resolve(request.out_url)
    return _Search(
        recipe=recipe,
        data_url=storage.resolve(request.data_url),
        directory=out_url,
        best_url=storage.join(out_url, BEST_NAME),
        candidates=candidates,
        details={},
    )


def _guided(recipe: Recipe, scale: float, *, is_pipeline: bool) -> list[str]:
    """Return the settings that generate with a guidance scale."""
    if not is_pipeline:
        return [f"sample.guidance_scale={scale}"]
    arguments = recipe.sample.pipeline | {"guidance_scale": scale}
    return [f"sample.pipeline={json.dumps(arguments)}"]


def _best(candidates: Sequence[dict[str, Any]], metric: MetricSpec) -> dict[str, Any]:
    values = [candidate["scores"].get(metric.key) for candidate in candidates]
    if None in values:
        raise ConfigError(
            f"{metric.title} was not computed: it needs {metric.needs} and enough images; expected "
            "a metric that the evaluation computed; choose another with --metric"
        )
    sign = -1 if metric.higher_is_better else 1
    return min(candidates, key=lambda candidate: sign * candidate["scores"][metric.key])


def _score(
    session: Session,
    recipe: Recipe,
    candidate: _Candidate,
    subset: str,
    on_progress: Callable[[str, EvalProgress], None],
) -> dict[str, Any]:
    evaluation = EvalRequest(
        recipe=apply_settings(recipe, candidate.settings),
        system=candidate.spec,
        data_url=storage.join(subset, "data"),
        out_url=storage.join(subset, candidate.name),
        save_images="none",
    )
    result = evaluate(evaluation, session, lambda progress: on_progress(candidate.name, progress))
    return {**candidate.details, "scores": result["scores"]}


def _write_subset(request: SelectRequest, source: str, directory: str) -> str:
    """Write the chosen validation instances as `data` in a directory, once per choice."""
    url = split_url(source, "valid")
    if url is None:
        raise DataError(
            f"{source} has no valid/manifest.json; expected a validation split; prepare it with "
            "d2i preprocess --split valid"
        )
    reader = ShardReader(url)
    rows = choose_instances(len(reader), request.num_instances, request.seed)
    subset = storage.join(directory, f"valid-{len(rows)}-of-seed-{request.seed}")
    data_url = storage.join(subset, "data")
    chosen = {"manifest_sha256": reader.manifest.sha256, "data": source}
    if named := lock_or_diff(storage.join(subset, "chosen.json"), chosen):
        raise ConfigError(f"{subset} was chosen from other data: got {'; '.join(named)}; delete it")
    if not storage.exists(storage.join(data_url, "manifest.json")):
        fingerprint = reader.manifest.fingerprint
        samples = _samples(reader, sorted(rows.tolist()))
        declared = fingerprint if reader.manifest.format == 2 else None
        write_shard(samples, data_url, 0, failures={}, fingerprint=declared)
        for name, values in _empty_features(reader):
            storage.write_bytes(storage.join(data_url, name), npy_bytes(values))
        write_manifest(data_url, fingerprint)
    return subset


def _samples(reader: ShardReader, rows: Sequence[int]) -> Iterator[Sample]:
    for row in rows:
        members = {"json": json_bytes(reader.read_json(row))}
        arrays = reader.read(np.array([row]))
        members |= {f"{name}.npy": npy_bytes(values[0]) for name, values in arrays.items()}
        image = reader.read_image(row)
        if image is not None:
            members[decode_image(image, ImageConfig()).suffix] = image
        yield Sample(reader.keys[row], members)


def _empty_features(reader: ShardReader) -> Iterator[tuple[str, Any]]:
    if "empty_tokens.npy" in reader.manifest.files:
        yield "empty_tokens.npy", reader.empty_tokens
    if "empty_text.npy" in reader.manifest.files:
        yield "empty_text.npy", reader.empty_text
