"""The evaluation job: draw and measure every test instance, then score (`d2i eval`)."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from d2i import storage
from d2i.cluster import Pool, run_tasks
from d2i.config import Recipe
from d2i.errors import ConfigError, DataError
from d2i.eval.metrics import compute_scores
from d2i.eval.systems import SystemSpec
from d2i.eval.worker import (
    EvalTask,
    EvalWorkerBuilder,
    SaveImages,
    describe_url,
    has_finished_tasks,
    task_url,
)
from d2i.fault import Fault
from d2i.recipes import check_prepared_with
from d2i.settle import settle
from d2i.shards import ShardReader

SCORES_NAME = "scores.json"


@dataclass(frozen=True)
class EvalRequest:
    """One evaluation.

    Args:
        num_workers: `0` works in this process, without Ray; `None` fits the machine or cluster.
    """

    recipe: Recipe
    system: SystemSpec
    data_url: str
    out_url: str
    save_images: SaveImages = "sample"
    num_workers: int | None = 0
    ray_address: str | None = None
    fault: Fault | None = None


@dataclass
class EvalProgress:
    """How far the evaluation is, for a progress line."""

    num_pictures: int
    num_before: int
    num_done: int = 0
    started: float = field(default_factory=time.monotonic)

    def line(self) -> str:
        """Return count, rate and time left."""
        rate = self.num_done / max(time.monotonic() - self.started, 1e-9)
        left = self.num_pictures - self.num_before - self.num_done
        done = self.num_before + self.num_done
        return f"{done}/{self.num_pictures} pictures  {rate:.1f}/s  {left / rate:.0f} s left"


def test_url(data_url: str) -> str:
    """Return the folder of the test shards: `DIR/test`, or `DIR` itself where it is one."""
    inner = storage.join(data_url, "test")
    return inner if storage.exists(storage.join(inner, "manifest.json")) else data_url


def plan_tasks(num_pictures: int, size: int) -> list[EvalTask]:
    """Cut the data set into groups of at most one compute batch."""
    return [
        EvalTask(number, tuple(range(start, min(start + size, num_pictures))))
        for number, start in enumerate(range(0, num_pictures, size))
    ]


def evaluate(request: EvalRequest, on_progress: Callable[[EvalProgress], None]) -> dict[str, Any]:
    """Run the job; repeated, it draws only what is missing.

    Returns:
        The content of `scores.json`: `scores` and `card`.

    Raises:
        ConfigError: If the output folder was begun with other settings.
        D2IError: What the user can mend; finished groups are kept.
    """
    with storage.only_writer(request.out_url):
        return _work(request, on_progress)


def _work(request: EvalRequest, on_progress: Callable[[EvalProgress], None]) -> dict[str, Any]:
    reader = ShardReader(request.data_url)
    check_prepared_with(request.recipe, request.data_url)
    for folder in ("tasks", "images"):
        storage.remove_leftovers(storage.join(request.out_url, folder))
    if not len(reader):
        raise DataError(
            f"{request.data_url} holds no sample; expected at least one; its ledger and "
            "manifest.json say why there is none"
        )
    tasks = plan_tasks(len(reader), request.recipe.sample.compute_batch_size)
    missing = [t for t in tasks if not storage.exists(task_url(request.out_url, t.number))]
    _settle(request, reader)
    num_before = len(reader) - sum(len(task.indices) for task in missing)
    progress = EvalProgress(len(reader), num_before)
    for _, num_done in run_tasks(_pool(request), missing):
        progress.num_done += num_done
        on_progress(progress)
    result = {
        "scores": _score([task_url(request.out_url, task.number) for task in tasks]),
        "card": _card(request, reader),
    }
    data = json.dumps(result, indent=1, sort_keys=True) + "\n"
    storage.write_bytes(storage.join(request.out_url, SCORES_NAME), data.encode())
    return result


def _pool(request: EvalRequest) -> Pool[EvalTask, int]:
    builder = EvalWorkerBuilder(
        recipe=request.recipe,
        system=request.system,
        data_url=storage.resolve(request.data_url),
        out_url=storage.resolve(request.out_url),
        save_images=request.save_images,
        fault=request.fault,
    )
    return Pool(builder, num_workers=request.num_workers, ray_address=request.ray_address)


def _decided_by(request: EvalRequest, reader: ShardReader) -> dict[str, Any]:
    recipe = request.recipe.model_dump(mode="json")
    return {
        "system": asdict(request.system) | {"backbone": request.system.backbone.model_dump()},
        "recipe": {name: recipe[name] for name in ("image", "encoders", "sample", "metrics")},
        "manifest_sha256": reader.manifest.sha256,
        "save_images": request.save_images,
    }


def _settle(request: EvalRequest, reader: ShardReader) -> None:
    kept, described = (
        storage.join(request.out_url, "evaluation.json"),
        describe_url(request.out_url),
    )
    if not has_finished_tasks(request.out_url):
        # Nothing was drawn under them yet: they may be those of a command with a typing error.
        storage.remove(kept)
        storage.remove(described)
    if differences := settle(kept, _decided_by(request, reader)):
        raise ConfigError(
            f"{request.out_url} was begun with other settings: got {'; '.join(differences[:3])}; "
            "repeat those or choose another --out"
        )


def _score(urls: Sequence[str]) -> dict[str, Any]:
    groups = [_read_npz(url) for url in urls]
    columns: dict[str, NDArray[Any]] = {
        name: np.concatenate([group[name] for group in groups]) for name in groups[0]
    }
    return compute_scores(
        columns["real_features"],
        columns["features"],
        columns.get("logits"),
        columns["real_embeddings"],
        columns["embeddings"],
    )


def _read_npz(url: str) -> dict[str, NDArray[Any]]:
    with np.load(io.BytesIO(storage.read_bytes(url)), allow_pickle=False) as arrays:
        return dict(arrays)


def _card(request: EvalRequest, reader: ShardReader) -> dict[str, Any]:
    """Return everything that decides the numbers, for whoever compares them."""
    manifest, sample = reader.manifest, request.recipe.sample
    of_workers: dict[str, Any] = json.loads(storage.read_bytes(describe_url(request.out_url)))
    return of_workers | {
        "system": request.system.name,
        "label": request.system.label,
        "run": request.system.run_dir,
        "data": storage.resolve(request.data_url),
        "manifest_sha256": manifest.sha256,
        "expected": manifest.num_samples + sum(manifest.failures.values()),
        "found": manifest.num_samples,
        "resolution": request.recipe.image.resolution,
        "resize": "lanczos, centre crop",
        "codec": "none: pictures stay in memory from sampler to metric",
        "sampler": sample.sampler,
        "num_steps": sample.num_steps,
        "guidance_scale": sample.guidance_scale,
        "seed": sample.seed,
        "compute_batch_size": sample.compute_batch_size,
    }
