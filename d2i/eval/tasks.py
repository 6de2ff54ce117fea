"""Groups of instances, and what one finished group leaves on disk.

A task is a run of neighbours in the data set. How long it is decides nothing but how the work is
dealt out: an evaluation may go on with tasks of another size. Must not import torch.
"""

from __future__ import annotations

import io
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from d2i import storage
from d2i.errors import DataError

_NAME = re.compile(r"(\d{8})-(\d{8})\.(?:npz|tar)")


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
        """What its files are called."""
        return f"{self.start:08d}-{self.stop:08d}"


def plan_tasks(num_instances: int, size: int, finished: Sequence[EvalTask] = ()) -> list[EvalTask]:
    """Cut what is not finished into tasks of at most `size` instances, in order.

    Args:
        num_instances: Instances in the data set.
        size: The most instances a task has.
        finished: What is done, in order, without overlaps.
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

    Of tasks that overlap, which a worker leaves that outlived its driver, one alone counts.
    """
    tasks: list[EvalTask] = []
    for task in _listed(storage.join(out_url, "tasks")):
        if not tasks or task.start >= tasks[-1].stop:
            tasks.append(task)
    return tasks


def saved_tasks(out_url: str) -> list[EvalTask]:
    """List the tasks of which pictures were kept, finished or not."""
    return _listed(storage.join(out_url, "images"))


def images_url(out_url: str, task: EvalTask) -> str:
    """Return where the pictures of a task are kept, where any are."""
    return storage.join(out_url, "images", f"{task.name}.tar")


def write_task(out_url: str, task: EvalTask, arrays: dict[str, NDArray[Any]]) -> None:
    """Keep what was measured of a task; with this file it is finished.

    Its name is not waited for: a power failure may cost the last tasks, which are then done anew.
    """
    with (
        storage.new_file(_task_url(out_url, task), sync_name=False) as path,
        path.open("wb") as file,
    ):
        np.savez(file, **arrays)  # type: ignore[arg-type]


def read_tasks(out_url: str, tasks: Sequence[EvalTask]) -> dict[str, NDArray[Any]]:
    """Put the arrays of tasks together, in the order given.

    Raises:
        DataError: If a task's file is damaged.
    """
    parts: dict[str, list[NDArray[Any]]] = {}
    for arrays in _each(out_url, tasks):
        for name, array in arrays.items():
            parts.setdefault(name, []).append(array)
    # One name at a time is there twice.
    return {name: np.concatenate(parts.pop(name)) for name in list(parts)}


def _listed(folder_url: str) -> list[EvalTask]:
    matches = map(_NAME.fullmatch, storage.list_names(folder_url))
    tasks = [EvalTask(int(match[1]), int(match[2])) for match in matches if match]
    return sorted(tasks, key=lambda task: (task.start, task.stop))


def _each(out_url: str, tasks: Sequence[EvalTask]) -> Iterator[dict[str, NDArray[Any]]]:
    urls = [_task_url(out_url, task) for task in tasks]
    for url, data in zip(urls, storage.read_each(urls), strict=True):
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
                yield dict(arrays)
        except (ValueError, EOFError, BadZipFile, zlib.error) as err:
            raise DataError(
                f"{url} is damaged: {err}; expected what a finished task leaves; remove it and "
                "repeat the command: its pictures are drawn anew"
            ) from err


def _task_url(out_url: str, task: EvalTask) -> str:
    return storage.join(out_url, "tasks", f"{task.name}.npz")
