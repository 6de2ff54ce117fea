"""The metric card: everything that decides the numbers, for whoever compares them."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

from d2i import storage
from d2i.eval.scores import Measured
from d2i.eval.worker import describe_url
from d2i.pictures import RESIZE
from d2i.shards import ShardReader

if TYPE_CHECKING:
    from d2i.eval.job import EvalRequest


def metric_card(request: EvalRequest, reader: ShardReader, measured: Measured) -> dict[str, Any]:
    """Return the card of a finished evaluation, as JSON values."""
    of_workers: dict[str, Any] = json.loads(storage.read_bytes(describe_url(request.out_url)))
    of_workers.pop("real")
    return of_workers | _system(request) | _data(request, reader, measured)


def _system(request: EvalRequest) -> dict[str, Any]:
    spec, sample = request.system, request.recipe.sample
    card = {
        "system": spec.name,
        "label": request.label or spec.label,
        "kind": spec.kind,
        "backbone": spec.network.name if spec.network else None,
        "run": spec.run_dir,
        "context": request.context,
        "text": request.recipe.text.model_dump(mode="json"),
        "seed": sample.seed,
        "compute_batch_size": sample.compute_batch_size,
    }
    if (spec.inner or spec).kind == "run":
        card["weights_kind"] = sample.weights
    if (spec.inner or spec).network is None:
        return card | {"pipeline_arguments": dict(sample.pipeline)}
    return card | {
        "sampler": sample.sampler,
        "num_steps": sample.num_steps,
        "guidance_scale": sample.guidance_scale,
        "unconditional": sample.unconditional,
        "data_type": sample.data_type,
        "precision": sample.precision,
    }


def _data(request: EvalRequest, reader: ShardReader, measured: Measured) -> dict[str, Any]:
    manifest, recipe = reader.manifest, request.recipe
    files = [source for source in measured.sources if " " in source]
    codecs = sorted({source.split()[0] for source in files})
    keys = "\n".join(sorted(measured.arrays["keys"].tolist()))
    return {
        "data": storage.resolve(request.data_url),
        "corpus": _corpus(request.data_url),
        "recipe": recipe.name,
        "manifest_sha256": manifest.sha256,
        "instances_sha256": hashlib.sha256(keys.encode()).hexdigest(),
        "expected": manifest.num_samples + sum(manifest.failures.values()),
        "found": len(measured.drawn),
        "failures": dict(manifest.failures) | measured.failures,
        "negatives": "as the corpus lists them" if measured.listed else "by key hash",
        "drawn_at": recipe.image.resolution,
        "resolution": recipe.metrics.resolution or recipe.image.resolution,
        "resize": RESIZE,
        "codec": f"{', '.join(codecs)} files"
        if codecs
        else "none: pictures stay in memory from sampler to metric",
        "picture_sizes": sorted({source.split()[1] for source in files})[:10],
    }


def _corpus(data_url: str) -> str | None:
    """Return the name of the corpus that the data were planned from, where that is known."""
    try:
        plan = json.loads(storage.read_bytes(storage.join(data_url, "plan", "plan.json")))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    found = plan.get("decided_by", {}).get("corpus") if isinstance(plan, dict) else None
    return str(found) if found else None
