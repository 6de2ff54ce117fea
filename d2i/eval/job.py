"""The evaluation job (`d2i eval`): generate and measure an image per test instance, then score."""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from d2i.cluster import Session
from d2i.cluster.estimate import Throughput, Work, save_rate
from d2i.cluster.session import Unit
from d2i.config import LEGACY_DEFAULTS
from d2i.corpora import CORPORA, has_categories
from d2i.errors import ConfigError, DataError
from d2i.eval.features.reference_features import ReferenceFeatures
from d2i.eval.fingerprint import hash_contents
from d2i.eval.metric_card import metric_card, planned_corpus
from d2i.eval.metrics.category_scores import write_categories
from d2i.eval.metrics.measured import Arrays, Measured
from d2i.eval.metrics.negatives import Listed, find_negatives
from d2i.eval.metrics.scores import instance_rows, score
from d2i.eval.request import EvalRequest
from d2i.eval.system import SystemSpec
from d2i.eval.tasks import (
    EvalTask,
    finished_tasks,
    plan_tasks,
    read_tasks,
    remove_unfinished,
)
from d2i.eval.worker import EvalWorkerBuilder, describe_url
from d2i.io import checksums, storage
from d2i.io.config_lock import lock_or_diff, read_settings, with_legacy_defaults
from d2i.io.progress_bar import Counts
from d2i.recipes import check_prepared_with
from d2i.shards import ShardReader

SCORES_NAME = "scores.json"
INSTANCES_NAME = "instances.jsonl"


@dataclass
class EvalProgress:
    """The progress of an evaluation."""

    num_images: int
    num_before: int
    num_done: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    started: float = field(default_factory=time.monotonic)

    def line(self) -> str:
        """Return count, rate, time left, and failures by reason."""
        rate = self.num_done / max(time.monotonic() - self.started, 1e-9)
        left = self.num_images - self.num_before - self.num_done
        done = self.num_before + self.num_done
        shown = f"{done}/{self.num_images} images  {rate:.1f}/s  {left / rate:.0f} s left"
        failed = ", ".join(f"{n} {reason}" for reason, n in self.failures.most_common())
        return f"{shown}  ({failed})" if failed else shown

    def counts(self) -> Counts:
        """Return the same for a progress bar."""
        return Counts(
            line=self.line(),
            done=self.num_before + self.num_done,
            total=self.num_images,
            unit="images",
            started=self.started,
            num_before=self.num_before,
            failures=dict(self.failures.most_common()),
        )


def evaluate(
    request: EvalRequest,
    session: Session,
    on_progress: Callable[[EvalProgress], None],
    *,
    negatives: str | None = None,
    task_size: int | None = None,
    open_shards: Callable[[str], ShardReader] = ShardReader,
) -> dict[str, Any]:
    """Run the evaluation; repeated, it generates only missing images.

    Args:
        request: The evaluation.
        session: Where its workers run.
        on_progress: Called after each task.
        negatives: Directory of the corpus whose negative candidates are used for recall; `None`
            draws them by key hash. Does not affect images, and may be added after they are
            generated.
        task_size: Instances per task; `None` uses one compute batch. Does not affect any number.
        open_shards: Opens a data set in any process; picklable. Pass another than `ShardReader` to
            choose where local copies of remote shards are kept.

    Returns:
        The content of `scores.json`: `scores`, `intervals`, `warnings` and `card`.

    Raises:
        ConfigError: If the output directory was started with other settings or weights, or
            `images:DIR` is combined with a context other than `full`.
        D2IError: For errors that the user can fix; finished tasks are kept.
    """
    if request.system.kind == "images" and request.context != "full":
        raise ConfigError(
            f"--context {request.context}: the images of {request.system.name} are generated "
            "already; expected full; name the context that they were generated from with --label"
        )
    with storage.exclusive_lock(request.out_url):
        return _work(request, session, on_progress, negatives, task_size, open_shards)


def work_left(request: EvalRequest, num_instances: int, task_size: int | None = None) -> Work:
    """Return the unfinished work of an evaluation of `num_instances`; write nothing."""
    missing = _missing_tasks(request, num_instances, task_size)
    # Workers write their measurements themselves: nothing passes through the object store.
    return Work(_num_instances(missing), len(missing), 0)


def rate_decided_by(request: EvalRequest, unit: Unit) -> dict[str, Any]:
    """Return everything in the request that a worker's speed depends on."""
    recipe = request.recipe.model_dump(mode="json")
    parts = {name: recipe[name] for name in ("image", "encoders", "sample", "metrics")}
    return {"stage": "eval", "system": _spec_values(request.system), "unit": unit, **parts}


def _work(
    request: EvalRequest,
    session: Session,
    on_progress: Callable[[EvalProgress], None],
    negatives: str | None,
    task_size: int | None,
    open_shards: Callable[[str], ShardReader],
) -> dict[str, Any]:
    reader = open_shards(request.data_url)
    check_prepared_with(request.recipe, request.data_url, parts=("image", "encoders"))
    remove_unfinished(request.out_url)
    if not len(reader):
        raise DataError(
            f"{request.data_url} has no samples; expected at least one; see its ledger and "
            "manifest.json for the reasons"
        )
    decided = _decided_by(request, reader)
    _check_resumable(request, decided)
    # Read before generating, so that errors in them show at once.
    listed = None if negatives is None else _find_negatives(request, reader, negatives)
    missing = _missing_tasks(request, len(reader), task_size)
    if missing:
        progress = EvalProgress(len(reader), len(reader) - _num_instances(missing))
        builder = _worker_builder(request, session, open_shards)
        _generate(request, session, builder, missing, progress, on_progress)
    measured = Measured(_read_arrays(request.out_url, len(reader)), listed)
    _write_rows(request, measured)
    _keep_real(request, measured)
    card = metric_card(request, reader, measured) | {"files": decided["files"]}
    result = score(measured, card["resolution"]) | {"card": card}
    if has_categories(card["corpus"]):
        write_categories(request.out_url, reader, measured.arrays)
    data = json.dumps(result, indent=1, sort_keys=True) + "\n"
    checksums.write_bytes(storage.join(request.out_url, SCORES_NAME), data.encode())
    return result


def _find_negatives(request: EvalRequest, reader: ShardReader, source: str) -> Listed:
    """Find the negatives that the corpus of the data set lists."""
    corpus = CORPORA.get(planned_corpus(request.data_url) or "")
    # Data without a plan are taken for the corpus that lists negatives.
    corpus = corpus or next(kind for kind in CORPORA.values() if kind.has_negatives)
    return find_negatives(reader, corpus(), source)


def _read_arrays(out_url: str, num_instances: int) -> Arrays:
    tasks = finished_tasks(out_url)
    num_finished = _num_instances(tasks)
    if num_finished != num_instances:
        raise DataError(
            f"{out_url}/tasks has {num_finished} of {num_instances} instances at the end: another "
            "process is writing to it; wait for that process to finish, then repeat the command"
        )
    return read_tasks(out_url, tasks)


def _generate(
    request: EvalRequest,
    session: Session,
    builder: EvalWorkerBuilder,
    tasks: list[EvalTask],
    progress: EvalProgress,
    on_progress: Callable[[EvalProgress], None],
) -> None:
    """Run the missing tasks."""
    session.start()
    offer = session.capacity()
    meter = Throughput(offer.num_busy(len(tasks)))
    for task, result in session.map(builder, tasks):
        progress.num_done += len(task.indices)
        progress.failures += result.failures
        meter.add(len(task.indices))
        on_progress(progress)
        session.trigger_at("eval.task_done")
    if (rate := meter.rate()) and session.capacity().has_workers_of(offer):
        save_rate(rate_decided_by(request, offer.unit), rate)


def _missing_tasks(
    request: EvalRequest, num_instances: int, task_size: int | None
) -> list[EvalTask]:
    size = task_size or request.recipe.sample.compute_batch_size
    return plan_tasks(num_instances, size, finished_tasks(request.out_url))


def _num_instances(tasks: list[EvalTask]) -> int:
    return sum(len(task.indices) for task in tasks)


def _worker_builder(
    request: EvalRequest, session: Session, open_shards: Callable[[str], ShardReader]
) -> EvalWorkerBuilder:
    return EvalWorkerBuilder(
        recipe=request.recipe,
        system=request.system,
        data_url=storage.resolve(request.data_url),
        out_url=storage.resolve(request.out_url),
        context=request.context,
        save_images=request.save_images,
        fault=session.job_fault,
        open_shards=open_shards,
    )


def _decided_by(request: EvalRequest, reader: ShardReader) -> dict[str, Any]:
    recipe = request.recipe.model_dump(mode="json")
    parts = ("image", "text", "encoders", "sample", "metrics")
    return {
        "system": _spec_values(request.system),
        "context": request.context,
        "recipe": {name: recipe[name] for name in parts},
        "manifest_sha256": reader.manifest.sha256,
        "save_images": request.save_images,
        "files": hash_contents(request.system),
    }


def _spec_values(spec: SystemSpec) -> dict[str, Any]:
    values = {name: getattr(spec, name) for name in ("name", "kind", "target", "run_dir")}
    network = spec.network.model_dump(mode="json") if spec.network else None
    inner = _spec_values(spec.inner) if spec.inner else None
    adapter = {"adapter": spec.adapter.path} if spec.adapter else {}
    return values | {"network": network, "inner": inner} | adapter


def _check_resumable(request: EvalRequest, decided: dict[str, Any]) -> None:
    kept, described = (
        storage.join(request.out_url, "evaluation.json"),
        describe_url(request.out_url),
    )
    if not finished_tasks(request.out_url):
        # No task has finished with these settings: they may come from a mistyped command.
        checksums.remove(kept)
        checksums.remove(described)
    formerly = {f"recipe.{path}": value for path, value in LEGACY_DEFAULTS.items()}
    differences = lock_or_diff(kept, decided, partial(with_legacy_defaults, formerly=formerly))
    if differences and all(difference.startswith("files.") for difference in differences):
        raise ConfigError(
            f"{request.out_url} has results of {request.system.name} from before its files "
            "changed; expected the same files; restore them, or choose another --out"
        )
    if differences:
        raise ConfigError(
            f"{request.out_url} was started with other settings: got {'; '.join(differences[:3])}; "
            "use the same settings, or choose another --out"
        )


def _write_rows(request: EvalRequest, measured: Measured) -> None:
    lines = (json.dumps(row) + "\n" for row in instance_rows(measured))
    storage.write_bytes(storage.join(request.out_url, INSTANCES_NAME), "".join(lines).encode())


def _keep_real(request: EvalRequest, measured: Measured) -> None:
    """Cache the features of the reference images for the next evaluation on this machine."""
    described = read_settings(describe_url(request.out_url))["real"]
    try:
        ReferenceFeatures(described).keep(measured.arrays)
    except OSError as err:
        # Only time is lost: the next evaluation computes them again.
        logging.getLogger(__name__).warning(
            "cannot cache the features of the reference images; the next evaluation computes them "
            "again: %s",
            err,
        )
