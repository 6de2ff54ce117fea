"""Which checkpoint of a run, and which guidance, draw best on validation dialogs (`d2i select`).

Everything lies in `RUN/select`: a seeded part of the validation split as a data set of its own, the
weights of each checkpoint, and an evaluation of each candidate, so that a repeated command draws
only what is missing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from d2i import storage
from d2i.config import ImageConfig, Recipe
from d2i.errors import CheckpointError, ConfigError, DataError
from d2i.eval.job import EvalProgress, EvalRequest, evaluate
from d2i.eval.systems import SystemSpec
from d2i.metric_specs import METRICS, MetricSpec
from d2i.models import save_weights
from d2i.pictures import decode_picture
from d2i.recipes import change_recipe
from d2i.runs import BEST_NAME, CONFIG_NAME, last_step, read_recipe
from d2i.settle import settle
from d2i.shards import Sample, ShardReader, json_bytes, npy_bytes, write_manifest, write_shard
from d2i.train.checkpoint import Checkpoint, step_of, whole_checkpoints
from d2i.train.data import split_url
from d2i.train.validation import choose_instances


@dataclass(frozen=True)
class SelectRequest:
    """What is to be compared.

    Args:
        run_url: A run with checkpoints.
        guidance_scales: Tried with each checkpoint; none takes the recipe's own.
        metric: What decides, a key of `d2i.metric_specs.METRICS`.
        num_instances: Size of the validation subset, at most.
        seed: Chooses the subset.
        settings: `--set` of the recipe, such as `sample.num_steps=20`.
        num_workers: As in `d2i eval`.
    """

    run_url: str
    guidance_scales: Sequence[float] = ()
    metric: str = "fid"
    num_instances: int = 1000
    seed: int = 0
    settings: Sequence[str] = ()
    num_workers: int | None = 0


def select(
    request: SelectRequest, on_progress: Callable[[str, EvalProgress], None]
) -> dict[str, Any]:
    """Score every candidate, and write `best.json` into the run.

    Returns:
        Its content: `weights` (relative to the run), `weights_kind`, `step`, `last_step` (of the
        run), `guidance_scale`, `metric`, `value`, `num_instances`, `seed`, and `candidates` with
        all of their scores.

    Raises:
        CheckpointError: If the run has no whole checkpoint.
        ConfigError: If the metric is none of `METRICS`, or was not scored.
        DataError: If its data has no validation split.
    """
    if request.metric not in METRICS:
        raise ConfigError(
            f"the metric: got {request.metric!r}; expected one of {', '.join(METRICS)}"
        )
    folder = storage.join(request.run_url, "select")
    recipe = change_recipe(read_recipe(request.run_url), request.settings)
    checkpoints = whole_checkpoints(request.run_url)
    if not checkpoints:
        raise CheckpointError(
            f"{request.run_url} has no whole checkpoint; expected one at least; repeat its "
            "d2i train command"
        )
    subset = _write_subset(request, folder)
    scales = request.guidance_scales or (recipe.sample.guidance_scale,)
    candidates = [
        _score(request, recipe, checkpoint, scale, subset, on_progress)
        for checkpoint in checkpoints
        for scale in scales
    ]
    best = _best(candidates, METRICS[request.metric])
    result = {
        "weights": best["weights"],
        "weights_kind": "ema",
        "step": best["step"],
        "last_step": max(step_of(checkpoints[-1]), last_step(request.run_url) or 0),
        "guidance_scale": best["guidance_scale"],
        "metric": request.metric,
        "value": best["scores"][request.metric],
        "num_instances": len(ShardReader(storage.join(subset, "data"))),
        "seed": request.seed,
        "candidates": candidates,
    }
    data = json.dumps(result, indent=1, sort_keys=True) + "\n"
    storage.write_bytes(storage.join(request.run_url, BEST_NAME), data.encode())
    return result


def _best(candidates: Sequence[dict[str, Any]], metric: MetricSpec) -> dict[str, Any]:
    values = [candidate["scores"].get(metric.key) for candidate in candidates]
    if None in values:
        raise ConfigError(
            f"{metric.title} was not scored, it needs {metric.needs} and enough images; expected a "
            "metric of the evaluation; choose another with --metric"
        )
    sign = -1 if metric.higher_is_better else 1
    return min(candidates, key=lambda candidate: sign * candidate["scores"][metric.key])


def _score(
    request: SelectRequest,
    recipe: Recipe,
    folder: str,
    guidance_scale: float,
    subset: str,
    on_progress: Callable[[str, EvalProgress], None],
) -> dict[str, Any]:
    run_url, step = storage.resolve(request.run_url), step_of(folder)
    kept = f"select/step-{step}.safetensors"
    weights = storage.join(run_url, kept)
    if not storage.exists(weights):
        checkpoint = Checkpoint(folder)
        checkpoint.check()
        with storage.new_file(weights) as path:
            save_weights(dict(checkpoint.read_whole("ema")), path)
    name = f"step-{step}, guidance {guidance_scale:g}"
    backbone = recipe.backbone.model_copy(update={"weights": weights})
    evaluation = EvalRequest(
        recipe=change_recipe(
            recipe, [f"sample.guidance_scale={guidance_scale}", "sample.weights=ema"]
        ),
        system=SystemSpec(f"run:{run_url}", name, "run", run_url, backbone, run_url),
        data_url=storage.join(subset, "data"),
        out_url=storage.join(subset, f"step-{step}-guidance-{guidance_scale:g}"),
        save_images="none",
        num_workers=request.num_workers,
    )
    result = evaluate(evaluation, lambda progress: on_progress(name, progress))
    return {
        "weights": kept,
        "step": step,
        "guidance_scale": guidance_scale,
        "scores": result["scores"],
    }


def _write_subset(request: SelectRequest, folder: str) -> str:
    """Write the chosen validation instances as `data` of a folder, once for each choice."""
    source = json.loads(storage.read_bytes(storage.join(request.run_url, CONFIG_NAME)))["data"]
    url = split_url(source, "valid")
    if url is None:
        raise DataError(
            f"{source} has no valid/manifest.json; expected a validation split; prepare it with "
            "d2i preprocess --split valid"
        )
    reader = ShardReader(url)
    rows = choose_instances(len(reader), request.num_instances, request.seed)
    subset = storage.join(folder, f"valid-{len(rows)}-of-seed-{request.seed}")
    data_url = storage.join(subset, "data")
    chosen = {"manifest_sha256": reader.manifest.sha256, "data": source}
    if named := settle(storage.join(subset, "chosen.json"), chosen):
        raise ConfigError(f"{subset} was chosen from other data: got {'; '.join(named)}; delete it")
    if not storage.exists(storage.join(data_url, "manifest.json")):
        fingerprint = reader.manifest.fingerprint
        write_shard(_samples(reader, sorted(rows.tolist())), data_url, 0, failures={})
        for name, values in _empty_features(reader):
            storage.write_bytes(storage.join(data_url, name), npy_bytes(values))
        write_manifest(data_url, fingerprint)
    return subset


def _samples(reader: ShardReader, rows: Sequence[int]) -> Iterator[Sample]:
    for row in rows:
        members = {"json": json_bytes(reader.read_json(row))}
        arrays = reader.read(np.array([row]))
        members |= {f"{name}.npy": npy_bytes(values[0]) for name, values in arrays.items()}
        picture = reader.read_image(row)
        if picture is not None:
            members[decode_picture(picture, ImageConfig()).suffix] = picture
        yield Sample(reader.keys[row], members)


def _empty_features(reader: ShardReader) -> Iterator[tuple[str, Any]]:
    if "empty_tokens.npy" in reader.manifest.files:
        yield "empty_tokens.npy", reader.empty_tokens
    if "empty_text.npy" in reader.manifest.files:
        yield "empty_text.npy", reader.empty_text
