"""Worker pool: tasks run under one contract, in this process or on a Ray cluster.

A worker is built once where it runs, takes one task at a time and keeps nothing of it. A dead
worker is replaced, and its task goes to the next idle worker; a task that raises ends the job.
"""

from __future__ import annotations

import functools
import logging
import os
import socket
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from d2i.cluster.actor_pool import ActorPool
from d2i.cluster.actors import (
    ResourceRequest,
    actor_size,
    check_own_node,
    get,
    num_workers_of,
    result_of,
)
from d2i.errors import ClusterError
from d2i.fault_injection import Fault


@dataclass(frozen=True)
class JobFault:
    """One injected fault for all workers; picklable. Made by `job_fault`."""

    fault: Fault
    passes: SharedActor[Fault]

    def trigger_at(self, point: str) -> None:
        """Trigger the fault in this process, if this is its point and its pass."""
        if point == self.fault.point and self.passes.call("is_due", point):
            self.fault.act()


def job_fault(fault: Fault, *, num_workers: int | None) -> JobFault:
    """Return a fault whose passes all workers of the open session count together."""
    return JobFault(fault, create_shared(fault, num_workers=num_workers))


TaskT = TypeVar("TaskT")
ResultT = TypeVar("ResultT")
ObjectT = TypeVar("ObjectT")
TaskIn = TypeVar("TaskIn", contravariant=True)
ResultOut = TypeVar("ResultOut", covariant=True)

_CONNECT_TIMEOUT_S = 10.0
_TICK_S = 5.0
# Longest socket path on Linux, and what Ray appends to its directory: the session's name with time
# and process, and /sockets/plasma_store.
_MAX_SOCKET_BYTES, _SOCKET_BYTES = 107, 67
_RAY_DIRECTORY = "/tmp/ray"


class Worker(Protocol[TaskIn, ResultOut]):
    """Runner of tasks: built once per process, called once per task."""

    def run(self, task: TaskIn) -> ResultOut:
        """Run one task; it may be run again after a worker has died in it."""
        ...


@dataclass(frozen=True)
class Pool(Generic[TaskT, ResultT]):
    """Workers of a job: their number, location and resources.

    Args:
        build_worker: Picklable; called in the worker's own process.
        num_workers: `0` runs every task in this process, without Ray. `None` takes one worker per
            accelerator, or per core if there is none.
        ray_address: A running cluster; `None` starts Ray on this machine for the job, whatever
            already runs here and whatever `RAY_ADDRESS` is.
        resources: Resources of one worker.
    """

    build_worker: Callable[[], Worker[TaskT, ResultT]]
    num_workers: int | None = None
    ray_address: str | None = None
    resources: ResourceRequest = field(default_factory=ResourceRequest)


class SharedActor(Generic[ObjectT]):
    """One object that the driver and every worker call, wherever they run.

    It lives as long as the session in which `create_shared` made it; picklable.
    """

    def __init__(self, target: Any, *, is_remote: bool) -> None:
        self._target = target
        self._is_remote = is_remote
        self._lock = threading.Lock()

    def call(self, method: str, *args: object, **kwargs: object) -> Any:
        """Call a method of the object, one call at a time, and return what it returns."""
        if self._is_remote:
            return get(self._target.call.remote(method, *args, **kwargs))
        with self._lock:
            return getattr(self._target, method)(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle without the lock."""
        return functools.partial(SharedActor, self._target, is_remote=self._is_remote), ()


def create_shared(value: ObjectT, *, num_workers: int | None) -> SharedActor[ObjectT]:
    """Create an object that all workers of the open session share.

    Args:
        value: Picklable; with Ray it is copied, and the caller's own object is not the shared one.
        num_workers: As in `Pool`: 0 if the tasks run in this process.
    """
    if num_workers == 0:
        return SharedActor(value, is_remote=False)
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # On the driver's node, so that its state is not lost with another node. An actor that requests
    # nothing goes to a random node first, which may not know the driver's yet: so it requests a
    # byte. If only its process dies, a new one starts from `value` and goes on.
    here = ray.get_runtime_context().get_node_id()
    beside: Any = NodeAffinitySchedulingStrategy(here, soft=True)
    holder = ray.remote(
        num_cpus=0, memory=1, max_restarts=-1, max_task_retries=-1, scheduling_strategy=beside
    )(_SharedObject)
    return SharedActor(holder.remote(value), is_remote=True)


class _SharedObject:
    """Ray actor that holds a shared object."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def call(self, method: str, *args: object, **kwargs: object) -> Any:
        return getattr(self._value, method)(*args, **kwargs)


@contextmanager
def session(num_workers: int | None, ray_address: str | None) -> Iterator[None]:
    """Keep Ray up for several calls of `run_tasks`; do nothing without Ray (0 workers).

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
        D2IError: Any that a task raised for the user to fix.
    """
    if not tasks:
        return
    if pool.num_workers == 0:
        yield from _run_here(pool, tasks)
    else:
        yield from _run_on_ray(pool, tasks)


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
        actors = ActorPool(pool.build_worker, size, num_workers)
        # Tasks are known here by their numbers.
        waiting = deque(range(len(tasks)))
        running: dict[Any, tuple[Any, int]] = {}
        while waiting or running:
            while waiting and actors.idle:
                actor, number = actors.idle.popleft(), waiting.popleft()
                running[actor.run.remote(tasks[number])] = (actor, number)
            ready = _first_ready([*actors.pending(), *running])
            if actors.is_building(ready):
                actors.on_ready(ready)
                continue
            actor, number = running.pop(ready)
            try:
                result = result_of(ready)
            except ray.exceptions.RayActorError as err:
                actors.restart_worker(number, err)
                # Resubmits the task.
                waiting.appendleft(number)
            else:
                actors.idle.append(actor)
                yield tasks[number], result


def _check_reachable(address: str) -> None:
    """Check that an address takes connections: Ray itself would retry for minutes.

    Raises:
        ClusterError: If nothing listens there.
    """
    host, _, port = address.rpartition(":")
    if "://" in address or not (host and port.isdigit()):
        return
    try:
        socket.create_connection((host, int(port)), _CONNECT_TIMEOUT_S).close()
    except OSError as err:
        raise ClusterError(
            f"no connection to {address}: {err}; expected a running Ray cluster; start it, or "
            "check the address and its firewall"
        ) from err


def _first_ready(references: list[Any]) -> Any:
    """Wait until a reference is ready, and return it."""
    import ray

    while not (ready := ray.wait(references, num_returns=1, timeout=_TICK_S)[0]):
        check_own_node()
    return ready[0]


def _short_directory() -> str | None:
    """Return a short directory for Ray's sockets; None leaves the choice to Ray.

    Cluster jobs often have a long TMPDIR, and the path of a socket has 107 bytes at most.
    """
    given = os.environ.get("RAY_TMPDIR")
    directory = os.path.join(given or tempfile.gettempdir(), "ray")  # noqa: PTH118
    is_short = len(os.fsencode(directory)) + _SOCKET_BYTES <= _MAX_SOCKET_BYTES
    return None if given or is_short else _RAY_DIRECTORY


def _not_started(address: str | None, error: Exception) -> str:
    reason = next(iter(str(error).splitlines()), "") or type(error).__name__
    if address:
        return (
            f"cannot join the Ray cluster at {address}: {reason}; expected it to run, and its "
            "token in RAY_AUTH_TOKEN or ~/.ray/auth_token; see 'd2i doctor'"
        )
    return (
        f"Ray did not start on this machine: {reason}; expected room for its processes and for "
        "sockets in its temporary directory; set RAY_TMPDIR to a short path on a local disk with "
        "free space, or run without Ray (--workers 0); see 'd2i doctor'"
    )


@contextmanager
def _ray_session(address: str | None, num_workers: int | None) -> Iterator[None]:
    # Ray reads these at import. Usage statistics are off unless the user turns them on.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if address != "auto":
        # Ray would prefer it over the given address.
        os.environ.pop("RAY_ADDRESS", None)
    import ray

    if ray.is_initialized():
        # An outer session keeps Ray up.
        yield
        return
    if address:
        _check_reachable(address)
    # On this machine, run as many workers as requested, however few cores there are.
    is_crowded = address is None and (num_workers or 0) > len(os.sched_getaffinity(0))
    try:
        ray.init(
            address=address or "local",
            _temp_dir=None if address else _short_directory(),
            num_cpus=num_workers if is_crowded else None,
            include_dashboard=None if address else False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except Exception as err:
        # Ray has a dozen exception classes for this, and raises a bare Exception as well.
        raise ClusterError(_not_started(address, err)) from err
    try:
        yield
    finally:
        ray.shutdown()
