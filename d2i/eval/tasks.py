"""Evaluation tasks: groups of instances, and the files of a finished group.

A task is a range of consecutive instances of the data set. Its size only affects how the work is
divided: an evaluation may resume with tasks of another size. Must not import torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from d2i.io import storage
from d2i.io.checksums import compare, file_sha256, sha256_of
from d2i.io.markers import read_markers, write_marker
from d2i.io.parse import damaged, parse_npz

_OF_ALL = ("keys", "reasons", "sources", "is_flat", "real_features", "real_embeddings")
_OF_GENERATED = ("features", "embeddings")
"""Names of arrays with one row per instance, and with one row per generated image."""
_GENERATE_AGAIN = "delete it and repeat the command to generate its images again"
MARKER_GONE = "delete it to read its task unverified, or delete the task's npz too to run it again"
_NAME = re.compile(r"(\d{8})-(\d{8})\.(npz|tar|json)")


@dataclass(frozen=True)
class EvalTask:
    """Instances `start` to `stop` - 1 of the data set."""

    start: int
    stop: int

    @property
    def indices(self) -> range:
        """The instances, by their index in the data set."""
        return range(self.start, self.stop)

    @property
    def name(self) -> str:
        """The stem of its files' names."""
        return f"{self.start:08d}-{self.stop:08d}"


def plan_tasks(num_instances: int, size: int, finished: Sequence[EvalTask] = ()) -> list[EvalTask]:
    """Divide the unfinished instances into tasks of at most `size` instances, in order.

    Args:
        num_instances: Instances in the data set.
        size: Most instances per task.
        finished: Finished tasks, in order, without overlaps.
    """
    gaps, start = [], 0
    for task in finished:
        gaps.append((start, task.start))
        start = task.stop
    gaps.append((start, num_instances))
    return [
        EvalTask(first, min(first + size, end))
        for begin, end in gaps
        for first in range(begin, end, size)
    ]


def finished_tasks(out_url: str) -> list[EvalTask]:
    """List the finished tasks of an evaluation, in the order of their instances.

    Tasks may overlap where a worker outlived its driver; only one of them counts.
    """
    tasks: list[EvalTask] = []
    for task in _listed(storage.join(out_url, "tasks"), "npz"):
        if not tasks or task.start >= tasks[-1].stop:
            tasks.append(task)
    return tasks


def saved_tasks(out_url: str) -> list[EvalTask]:
    """List the tasks with saved images, finished or not."""
    return _listed(storage.join(out_url, "images"), "tar")


def remove_unfinished(out_url: str) -> None:
    """Remove leftovers of killed processes: temporary files, and files of unfinished tasks."""
    for directory in ("tasks", "images"):
        storage.remove_temp_files(storage.join(out_url, directory))
    finished = set(finished_tasks(out_url))
    for task in {*_listed(storage.join(out_url, "tasks"), "json")} - finished:
        storage.remove(storage.join(out_url, _marker_path(task)))
    for task in {*saved_tasks(out_url)} - finished:
        storage.remove(images_url(out_url, task))


def images_url(out_url: str, task: EvalTask) -> str:
    """Return the URL of the saved images of a task, which may not exist."""
    return storage.join(out_url, images_path(task))


def images_path(task: EvalTask) -> str:
    """Return the path of the saved images of a task within the evaluation."""
    return f"images/{task.name}.tar"


def write_task(
    out_url: str,
    task: EvalTask,
    arrays: dict[str, NDArray[Any]],
    images: Mapping[str, str] | None = None,
) -> None:
    """Write the measurements of a task, and a marker with their sha256 and that of its images.

    Directories are not synced: a power failure may lose the last tasks, which are then run again.

    Args:
        out_url: The evaluation's directory.
        task: The task.
        arrays: Its measurements.
        images: sha256 of the file of its saved images, by path within the evaluation.
    """
    marker_url = storage.join(out_url, _marker_path(task))
    storage.remove(marker_url)
    with storage.new_file(storage.join(out_url, _task_path(task)), sync_name=False) as scratch:
        with scratch.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
        digest = file_sha256(str(scratch))
    files = {_task_path(task): digest, **(images or {})}
    write_marker(marker_url, files, sync_name=False)


def read_tasks(out_url: str, tasks: Sequence[EvalTask]) -> dict[str, NDArray[Any]]:
    """Concatenate the arrays of tasks, in the order given.

    Raises:
        DataError: If a task's file is damaged, or differs from the sha256 in the task's marker.
    """
    parts: dict[str, list[NDArray[Any]]] = {}
    for arrays in _each(out_url, tasks):
        for name, array in arrays.items():
            parts.setdefault(name, []).append(array)
    # Only one name at a time is in memory twice.
    return {name: np.concatenate(parts.pop(name)) for name in list(parts)}


def _listed(directory_url: str, suffix: str) -> list[EvalTask]:
    found = map(_NAME.fullmatch, storage.list_names(directory_url))
    tasks = [EvalTask(int(m[1]), int(m[2])) for m in found if m and m[3] == suffix]
    return sorted(tasks, key=lambda task: (task.start, task.stop))


def _each(out_url: str, tasks: Sequence[EvalTask]) -> Iterator[dict[str, NDArray[Any]]]:
    sums = read_markers(storage.join(out_url, "tasks"), next_step=MARKER_GONE)
    paths = [_task_path(task) for task in tasks]
    urls = [storage.join(out_url, path) for path in paths]
    for task, path, url, data in zip(tasks, paths, urls, storage.read_each(urls), strict=True):
        where = _marker_path(task)
        compare(url, sha256_of(data), sums.get(path), where=where, next_step=_GENERATE_AGAIN)
        arrays = parse_npz(data, url, next_step=_GENERATE_AGAIN)
        _check_rows(url, task, arrays)
        yield arrays


def _check_rows(url: str, task: EvalTask, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Check that the arrays of a task belong together; tasks of earlier versions have no marker.

    Raises:
        DataError: If one is missing, or has another number of rows.
    """
    num = len(task.indices)
    rows = {name: array.shape[0] if array.ndim else -1 for name, array in arrays.items()}
    if "reasons" in arrays:
        num_generated = int((arrays["reasons"] == "").sum())
        of_generated = dict.fromkeys(_OF_GENERATED, num_generated) if num_generated else {}
        of_generated |= {"logits": num_generated} if "logits" in rows else {}
        of_all = dict.fromkeys((*_OF_ALL, *{"text_embeddings"} & rows.keys()), num)
        expected = of_all | of_generated
    else:
        expected = dict.fromkeys(rows, num)
    if rows != expected:
        reason = f"got rows {rows}; expected {expected}"
        raise damaged(url, reason, next_step=_GENERATE_AGAIN)


def _task_path(task: EvalTask) -> str:
    return f"tasks/{task.name}.npz"


def _marker_path(task: EvalTask) -> str:
    return f"tasks/{task.name}.json"
