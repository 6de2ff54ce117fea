"""Pool of workers: tasks run under one contract, in this process or on a Ray cluster.

A worker is built once where it runs, takes one task at a time and keeps nothing of it. A dead
worker is replaced, and its task goes to the next idle worker; a task that raises ends the job.
Nodes that join the cluster during the job get workers too.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

from d2i.cluster.actor_pool import ActorPool
from d2i.cluster.actors import ActorSize, check_own_node, num_workers_of, result_of

TaskT = TypeVar("TaskT")
ResultT = TypeVar("ResultT")
TaskIn = TypeVar("TaskIn", contravariant=True)
ResultOut = TypeVar("ResultOut", covariant=True)

_TICK_S = 5.0


class Worker(Protocol[TaskIn, ResultOut]):
    """Runner of tasks: built once per process, called once per task."""

    def run(self, task: TaskIn) -> ResultOut:
        """Run one task; it may be run again after a worker has died in it."""
        ...


def map_here(
    build_worker: Callable[[], Worker[TaskT, ResultT]], tasks: Sequence[TaskT]
) -> Iterator[tuple[TaskT, ResultT]]:
    """Yield (task, result) of each task, run by one worker in this process."""
    worker = build_worker()
    for task in tasks:
        yield task, worker.run(task)


def map_on_ray(
    build_worker: Callable[[], Worker[TaskT, ResultT]],
    tasks: Sequence[TaskT],
    size: ActorSize,
    num_workers: int | None,
) -> Iterator[tuple[TaskT, ResultT]]:
    """Yield (task, result) as tasks finish, in any order, each task exactly once.

    Args:
        build_worker: Picklable; called in each worker's own process.
        tasks: Tasks to run, at least one.
        size: Resources of one worker.
        num_workers: Number of workers; None takes as many as fit, also on nodes that join later.

    Raises:
        ClusterError: If a worker keeps dying.
        D2IError: Any that a task raised for the user to fix.
    """
    import ray

    # Tasks are known here by their numbers.
    waiting = deque(range(len(tasks)))
    running: dict[Any, tuple[Any, int]] = {}
    actors = ActorPool(build_worker, size, min(num_workers_of(num_workers, size), len(tasks)))
    next_count = time.monotonic() + _TICK_S
    while waiting or running:
        if time.monotonic() >= next_count:
            fitting = num_workers_of(num_workers, size)
            actors.grow(min(fitting, len(waiting) + len(running)))
            next_count = time.monotonic() + _TICK_S
        while waiting and actors.idle:
            actor, number = actors.idle.popleft(), waiting.popleft()
            running[actor.run.remote(tasks[number])] = (actor, number)
        ready = _first_ready([*actors.pending(), *running])
        if ready is None:
            check_own_node()
            continue
        if actors.is_building(ready):
            actors.on_ready(ready)
            continue
        actor, number = running.pop(ready)
        try:
            result = result_of(ready)
        except ray.exceptions.RayActorError as err:
            actors.restart_worker(number, actor, err)
            # Resubmits the task.
            waiting.appendleft(number)
        else:
            actors.idle.append(actor)
            yield tasks[number], result


def _first_ready(references: list[Any]) -> Any:
    """Return the first reference that is ready within `_TICK_S`, or None."""
    import ray

    ready, _ = ray.wait(references, num_returns=1, timeout=_TICK_S)
    return ready[0] if ready else None


def device_of_worker() -> str:
    """Return the torch device of this process, and fix its number of threads.

    On a CPU each worker computes with one thread, whatever the machine has: sums are then taken in
    one order, and a shard's bytes do not depend on the core count.
    """
    import torch

    if torch.cuda.is_available():
        return "cuda"
    torch.set_num_threads(1)
    return "cpu"
