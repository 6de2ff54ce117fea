"""Run tasks on workers: one contract, in this process or on a Ray cluster.

A worker is built once where it runs, takes one task at a time and keeps nothing of it. A dead
worker is started anew and its task given out again; a task that raises ends the job.
"""

from __future__ import annotations

import functools
import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from d2i.errors import ClusterError, D2IError

TaskT = TypeVar("TaskT")
ResultT = TypeVar("ResultT")
ObjectT = TypeVar("ObjectT")
TaskIn = TypeVar("TaskIn", contravariant=True)
ResultOut = TypeVar("ResultOut", covariant=True)

# A task that takes this many more workers down with it ends the job with a clear message.
NUM_RETRIES = 3


class Worker(Protocol[TaskIn, ResultOut]):
    """What runs tasks: built once per process, called once per task."""

    def run(self, task: TaskIn) -> ResultOut:
        """Do one task; a task may be given out again after a worker has died in it."""
        ...


@dataclass(frozen=True)
class ResourceRequest:
    """What one worker occupies. An accelerator is taken where the cluster has any."""

    num_cpus: float = 1.0
    num_gpus: float = 1.0


@dataclass(frozen=True)
class Pool(Generic[TaskT, ResultT]):
    """How many workers there are, where, and what each occupies.

    Args:
        build_worker: Picklable; called in the worker's own process.
        num_workers: `0` runs every task in this process, without Ray. `None` takes one worker
            per accelerator, or per core where there is none.
        ray_address: A running cluster; `None` starts Ray on this machine for the job, whatever
            runs here already and whatever `RAY_ADDRESS` says.
        resources: What one worker occupies.
    """

    build_worker: Callable[[], Worker[TaskT, ResultT]]
    num_workers: int | None = None
    ray_address: str | None = None
    resources: ResourceRequest = ResourceRequest()


class Shared(Generic[ObjectT]):
    """One object that the driver and every worker call, wherever they run.

    It lives as long as the session in which `share` made it; picklable.
    """

    def __init__(self, target: Any, *, is_remote: bool) -> None:
        self._target = target
        self._is_remote = is_remote
        self._lock = threading.Lock()

    def call(self, method: str, *args: object, **kwargs: object) -> Any:
        """Call a method of the object, one call at a time, and return what it returns."""
        if self._is_remote:
            import ray

            return ray.get(self._target.call.remote(method, *args, **kwargs))
        with self._lock:
            return getattr(self._target, method)(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle without the lock."""
        return functools.partial(Shared, self._target, is_remote=self._is_remote), ()


def share(value: ObjectT, *, num_workers: int | None) -> Shared[ObjectT]:
    """Make an object common to all workers of the session that is open.

    Args:
        value: Picklable; the caller's own copy is not the common one, unless there is no Ray.
        num_workers: As the pool's: 0 where the tasks run in this process.
    """
    if num_workers == 0:
        return Shared(value, is_remote=False)
    import ray

    # With its node, what it knew is lost; a new one starts from `value` and goes on.
    holder = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(_Holder)
    return Shared(holder.remote(value), is_remote=True)


class _Holder:
    """Holds a shared object in its Ray process."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def call(self, method: str, *args: object, **kwargs: object) -> Any:
        return getattr(self._value, method)(*args, **kwargs)


@contextmanager
def session(num_workers: int | None, ray_address: str | None) -> Iterator[None]:
    """Keep Ray up for several calls of `run_tasks`; without Ray (0 workers) do nothing.

    Raises:
        ClusterError: If Ray cannot start or be reached.
    """
    if num_workers == 0:
        yield
        return
    with _ray_session(ray_address, num_workers):
        yield


def run_tasks(
    pool: Pool[TaskT, ResultT], tasks: Sequence[TaskT]
) -> Iterator[tuple[TaskT, ResultT]]:
    """Yield (task, result) as tasks finish, in any order, each task exactly once.

    Raises:
        ClusterError: If Ray cannot start or be reached, or a worker keeps dying.
        D2IError: Whatever a task raised for the user to mend.
    """
    if not tasks:
        return
    if pool.num_workers == 0:
        yield from _run_here(pool, tasks)
    else:
        yield from _run_on_ray(pool, tasks)


def device_of_worker() -> str:
    """Return the torch device of the process this is called in, and fix its threads.

    On a CPU each worker computes with one thread, whatever the machine has: sums are then taken
    in one order, and a shard's bytes depend on no core count.
    """
    import torch

    if torch.cuda.is_available():
        return "cuda"
    torch.set_num_threads(1)
    return "cpu"


def _run_here(
    pool: Pool[TaskT, ResultT], tasks: Sequence[TaskT]
) -> Iterator[tuple[TaskT, ResultT]]:
    worker = pool.build_worker()
    for task in tasks:
        yield task, worker.run(task)


def _run_on_ray(
    pool: Pool[TaskT, ResultT], tasks: Sequence[TaskT]
) -> Iterator[tuple[TaskT, ResultT]]:
    import ray

    with session(pool.num_workers, pool.ray_address):
        size = actor_size(pool.resources)
        num_workers = min(num_workers_of(pool.num_workers, size), len(tasks))
        waiting = list(reversed(tasks))
        running: dict[Any, tuple[Any, TaskT]] = {}
        for _ in range(num_workers):
            actor = start_actor(pool.build_worker, size, num_retries=NUM_RETRIES)
            _give(actor, waiting, running)
        while running:
            (ready, *_), _ = ray.wait(list(running), num_returns=1)
            actor, task = running.pop(ready)
            result = result_of(ready)
            _give(actor, waiting, running)
            yield task, result


def _give(actor: Any, waiting: list[TaskT], running: dict[Any, tuple[Any, TaskT]]) -> None:
    if waiting:
        task = waiting.pop()
        running[actor.run.remote(task)] = (actor, task)


def result_of(reference: Any) -> Any:
    """Return what an actor's task gave.

    Raises:
        D2IError: If it raised that.
        ClusterError: If its worker keeps dying.
    """
    import ray

    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as err:
        if isinstance(err.cause, D2IError):
            raise type(err.cause)(str(err.cause)) from err
        raise
    except ray.exceptions.RayActorError as err:
        raise too_many_deaths(err) from err


def too_many_deaths(err: Exception) -> ClusterError:
    """Say that a task ends every worker it is given to."""
    return ClusterError(
        f"a task took {NUM_RETRIES + 1} workers down with it: {str(err).splitlines()[0]}; "
        "expected it to finish; look for memory pressure, then repeat the command: finished "
        "work is kept"
    )


@dataclass(frozen=True)
class ActorSize:
    """What one actor occupies on the cluster at hand."""

    num_cpus: float
    num_gpus: float


def actor_size(resources: ResourceRequest) -> ActorSize:
    """Return what a worker occupies, without an accelerator where the cluster has none."""
    import ray

    has_gpus = bool(ray.cluster_resources().get("GPU", 0))
    return ActorSize(resources.num_cpus, resources.num_gpus if has_gpus else 0.0)


def start_actor(build_worker: Callable[[], Any], size: ActorSize, *, num_retries: int) -> Any:
    """Start an actor, which is started anew whenever it dies, and its task given to it again."""
    import ray

    options = ray.remote(
        num_cpus=size.num_cpus,
        num_gpus=size.num_gpus,
        max_restarts=-1 if num_retries else 0,
        max_task_retries=num_retries,
        # Ray would fill one node after the other with those that occupy nothing.
        scheduling_strategy="SPREAD",
    )
    return options(_WorkerActor).remote(build_worker)


def num_workers_of(asked: int | None, size: ActorSize) -> int:
    """Return how many workers there are: as asked, or as many as fit."""
    import ray

    if asked:
        return asked
    total = ray.cluster_resources()
    if size.num_gpus:
        return max(1, int(total["GPU"] // size.num_gpus))
    return max(1, int(total.get("CPU", 1) // size.num_cpus))


class _WorkerActor:
    """Holds the worker in its Ray process.

    It is built with the first task: an error in building then reaches the driver as what it is.
    """

    def __init__(self, build_worker: Callable[[], Any]) -> None:
        self._build_worker = build_worker
        self._worker: Any = None

    def build(self) -> None:
        if self._worker is None:
            self._worker = self._build_worker()

    def run(self, task: Any) -> Any:
        self.build()
        return self._worker.run(task)

    def stream(self, task: Any) -> Iterator[Any]:
        self.build()
        yield from self._worker.stream(task)

    def finish(self, task: Any, blocks: list[Any]) -> Any:
        import ray

        self.build()
        # One at a time: what is not held any more leaves this process's memory.
        return self._worker.run(task, (ray.get(block) for block in blocks))


@contextmanager
def _ray_session(address: str | None, num_workers: int | None) -> Iterator[None]:
    # Ray reads these at import; nothing is reported to anyone unless the user asks for it.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Ray would prefer it over the address that was asked for.
    os.environ.pop("RAY_ADDRESS", None)
    import ray

    if ray.is_initialized():
        # A session around this one keeps it up.
        yield
        return
    # On this machine as many workers as are asked for, however few cores there are.
    is_crowded = address is None and (num_workers or 0) > len(os.sched_getaffinity(0))
    try:
        ray.init(
            address=address or "local",
            num_cpus=num_workers if is_crowded else None,
            include_dashboard=None if address else False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except (ConnectionError, OSError, RuntimeError, ValueError) as err:
        where = f"the cluster at {address}" if address else "Ray on this machine"
        raise ClusterError(
            f"{where} did not start: {str(err).splitlines()[0]}; expected a running Ray; "
            "see 'd2i doctor'"
        ) from err
    try:
        yield
    finally:
        ray.shutdown()
