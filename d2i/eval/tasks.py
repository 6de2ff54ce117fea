"""Groups of instances, and what one finished group leaves on disk.

A task is a run of neighbours in the data set. How long it is decides nothing but how the work is
dealt out: an evaluation may go on with tasks of another size. Must not import torch.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from d2i import storage

_NAME = re.compile(r"(\d{8})-(\d{8})\.npz")


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
    """List the finished tasks of an evaluation, in the order of their instances."""
    names = storage.list_names(storage.join(out_url, "tasks"))
    found = filter(None, map(_NAME.fullmatch, names))
    return sorted((EvalTask(int(m[1]), int(m[2])) for m in found), key=lambda task: task.start)


def write_task(out_url: str, task: EvalTask, arrays: dict[str, NDArray[Any]]) -> None:
    """Keep what was measured of a task; with this file it is finished."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    storage.write_bytes(_task_url(out_url, task), buffer.getvalue())


def read_tasks(out_url: str, tasks: Sequence[EvalTask]) -> dict[str, NDArray[Any]]:
    """Put the arrays of tasks together, in the order given."""
    parts: dict[str, list[NDArray[Any]]] = {}
    for arrays in _each(out_url, tasks):
        for name, array in arrays.items():
            parts.setdefault(name, []).append(array)
    # One name at a time is there twice.
    return {name: np.concatenate(parts.pop(name)) for name in list(parts)}


def _each(out_url: str, tasks: Sequence[EvalTask]) -> Iterator[dict[str, NDArray[Any]]]:
    for data in storage.read_each(_task_url(out_url, task) for task in tasks):
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            yield dict(arrays)


def _task_url(out_url: str, task: EvalTask) -> str:
    return storage.join(out_url, "tasks", f"{task.name}.npz")
