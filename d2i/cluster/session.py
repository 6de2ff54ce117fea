"""Session: where the work of one command runs. This process, Ray on this machine, or a cluster."""

from __future__ import annotations

import logging
import os
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import TracebackType
from typing import Literal, Self, TypeVar

from d2i.cluster.actors import ResourceRequest, actor_size, num_cluster_cores, num_workers_of
from d2i.cluster.nodes import list_nodes, wait_for_worker_node
from d2i.cluster.pipeline import Consumer, Producer, pipeline_here, pipeline_on_ray
from d2i.cluster.pool import Worker, map_here, map_on_ray
from d2i.cluster.shared_actor import JobFault, SharedActor, create_remote
from d2i.errors import ClusterError
from d2i.fault_injection import Fault, Point

TaskT = TypeVar("TaskT")
BlockT = TypeVar("BlockT")
ResultT = TypeVar("ResultT")
ObjectT = TypeVar("ObjectT")

_CONNECT_TIMEOUT_S = 10.0
# A GPU node may take this long to start and to pull its image.
_WORKER_NODE_TIMEOUT_S = 1800.0
# Longest socket path on Linux, and what Ray appends to its directory: the session's name with time
# and process, and /sockets/plasma_store.
_MAX_SOCKET_BYTES, _SOCKET_BYTES = 107, 67
_RAY_DIRECTORY = "/tmp/ray"

Unit = Literal["accelerator", "core"]


@dataclass(frozen=True)
class Capacity:
    """Resources that a job would get.

    Args:
        num_nodes: Live nodes, with or without workers.
        num_workers: Workers, as requested or as many as fit.
        unit: Resource that each worker occupies.
        object_store_bytes: Memory of all object stores; 0 if Ray is not started yet.
    """

    num_nodes: int
    num_workers: int
    unit: Unit
    object_store_bytes: int

    def has_workers_of(self, earlier: Capacity) -> bool:
        """Return whether there are as many workers as before: nodes may have joined, or left."""
        return self.num_workers == earlier.num_workers

    def num_busy(self, num_tasks: int) -> int:
        """Return how many of the workers have a task."""
        return min(self.num_workers, num_tasks)


class Session:
    """Runs the tasks of a command and holds the objects that its workers share.

    A context manager. Ray starts, or is joined, when it is first needed; what was started or joined
    for the session is left at its end.

    Args:
        num_workers: `0` runs everything in this process, without Ray. `None` takes one worker per
            accelerator, or per core if there is none.
        ray_address: A running cluster; `None` starts Ray on this machine for the session, whatever
            already runs here and whatever `RAY_ADDRESS` is.
        fault: A fault to inject, for tests.
        num_producers: Workers of the first stage of a pipeline; `None` fits the machine or cluster.
        on_start: Called with a line to print before Ray starts or is joined, which takes seconds.
    """

    def __init__(
        self,
        num_workers: int | None = None,
        ray_address: str | None = None,
        fault: Fault | None = None,
        *,
        num_producers: int | None = None,
        on_start: Callable[[str], None] = lambda _line: None,
    ) -> None:
        self._num_workers, self._ray_address = num_workers, ray_address
        self._on_start = on_start
        self._fault, self._num_producers = fault, num_producers
        self._has_started_ray = False
        self._had_worker_node = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._has_started_ray:
            import ray

            ray.shutdown()
            self._has_started_ray = False

    @property
    def is_on_this_machine(self) -> bool:
        """True if no worker runs on another machine."""
        return self._ray_address is None or not self._uses_ray

    def start(self) -> None:
        """Start or join Ray now, if the session uses it.

        Raises:
            ClusterError: If Ray cannot start or be reached.
        """
        if self._uses_ray and not self._has_started_ray:
            self._has_started_ray = _start_ray(self._ray_address, self._num_workers, self._on_start)

    def map(
        self,
        build_worker: Callable[[], Worker[TaskT, ResultT]],
        tasks: Sequence[TaskT],
        *,
        size: ResourceRequest | None = None,
    ) -> Iterator[tuple[TaskT, ResultT]]:
        """Yield (task, result) as tasks finish, in any order, each task exactly once.

        Args:
            build_worker: Picklable; called in each worker's own process.
            tasks: Tasks to run.
            size: Resources of one worker: a core, and an accelerator if there are any.

        Raises:
            ClusterError: If Ray cannot start or be reached, or has no node for workers in half an
                hour, or a worker keeps dying.
            D2IError: Any that a task raised for the user to fix.
        """
        if not tasks:
            return
        if not self._uses_ray:
            yield from map_here(build_worker, tasks)
            return
        self._start_with_worker_node()
        actors = actor_size(size or ResourceRequest())
        yield from map_on_ray(build_worker, tasks, actors, self._num_workers)

    def pipeline(
        self,
        build_producer: Callable[[], Producer[TaskT, BlockT]],
        build_consumer: Callable[[], Consumer[TaskT, BlockT, ResultT]],
        tasks: Sequence[TaskT],
        on_wait: Callable[[], None] = lambda: None,
    ) -> Iterator[tuple[TaskT, ResultT]]:
        """Yield (task, result) as tasks finish, in any order, each task exactly once.

        Producers stream the blocks of a task, consumers finish it; each stage has its own workers.

        Args:
            build_producer: Picklable; called in the producer's own process.
            build_consumer: Picklable; called in the consumer's own process.
            tasks: Tasks to run.
            on_wait: Called about once a second, or between two blocks without Ray.

        Raises:
            ClusterError: If Ray cannot start or be reached, or has no node for workers in half an
                hour, or workers keep dying.
            D2IError: Any that a task raised for the user to fix.
        """
        if not tasks:
            return
        if not self._uses_ray:
            yield from pipeline_here(build_producer, build_consumer, tasks, on_wait)
            return
        self._start_with_worker_node()
        yield from pipeline_on_ray(
            build_producer,
            build_consumer,
            tasks,
            on_wait,
            num_consumers=self._num_workers,
            num_producers=self._num_producers,
        )

    def shared(self, value: ObjectT) -> SharedActor[ObjectT]:
        """Create an object that the driver and all workers share while the session lasts.

        Args:
            value: Picklable; with Ray it is copied, and the caller's own object is not the shared
                one.

        Raises:
            ClusterError: If Ray cannot start or be reached.
        """
        self.start()
        return create_remote(value) if self._uses_ray else SharedActor(value, is_remote=False)

    def capacity(self) -> Capacity:
        """Return what the work gets. Joins a cluster, but does not start Ray on this machine.

        Raises:
            ClusterError: If the cluster cannot be reached, or has no node for workers in half an
                hour.
        """
        if self._ray_address is not None and not self._had_worker_node:
            self._start_with_worker_node()
        if not self._uses_ray or not _is_ray_running():
            return _local_capacity(self._num_workers)
        nodes, size = list_nodes(), actor_size(ResourceRequest())
        unit: Unit = "accelerator" if size.num_gpus else "core"
        store_bytes = sum(node.object_store_bytes for node in nodes)
        num_workers = num_workers_of(self._num_workers, size)
        return Capacity(len(nodes), num_workers, unit, store_bytes)

    def num_cores(self) -> int:
        """Return the cores of all nodes, or 1 without Ray.

        Raises:
            ClusterError: If Ray cannot start or be reached, or has no node for workers in half an
                hour.
        """
        self._start_with_worker_node()
        return num_cluster_cores() if self._uses_ray else 1

    @cached_property
    def job_fault(self) -> JobFault | None:
        """The injected fault, for the workers: they count its passes together. None without one."""
        return None if self._fault is None else JobFault(self._fault, self.shared(self._fault))

    def trigger_at(self, point: Point) -> None:
        """Trigger the injected fault at a point that only the driver passes."""
        if self._fault:
            self._fault.trigger_at(point)

    def _start_with_worker_node(self) -> None:
        """Start or join Ray; on a cluster, wait for a first node that has room for workers.

        Whether it has accelerators decides for the whole job whether the workers use any.
        """
        self.start()
        if self._ray_address is not None and self._uses_ray:
            self._wait_for_worker_node(self._ray_address)
            self._had_worker_node = True

    def _wait_for_worker_node(self, address: str) -> None:
        if wait_for_worker_node(0.0):
            return
        minutes = _WORKER_NODE_TIMEOUT_S / 60
        self._on_start(f"Waiting up to {minutes:.0f} minutes for a first worker node …")
        if not wait_for_worker_node(_WORKER_NODE_TIMEOUT_S):
            raise ClusterError(
                f"the Ray cluster at {address} has no node with cores or accelerators "
                f"after {minutes:.0f} minutes; expected at least one worker node; start some, or "
                "see 'd2i cluster check'"
            )

    @property
    def _uses_ray(self) -> bool:
        return self._num_workers != 0


def _local_capacity(num_workers: int | None) -> Capacity:
    import torch

    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    fitting = num_gpus or len(os.sched_getaffinity(0))
    unit: Unit = "accelerator" if num_gpus else "core"
    return Capacity(1, 1 if num_workers == 0 else num_workers or fitting, unit, 0)


def _is_ray_running() -> bool:
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


def _start_ray(
    address: str | None, num_workers: int | None, on_start: Callable[[str], None]
) -> bool:
    """Start or join Ray unless this process already has; return whether it did."""
    # Ray reads these at import. Usage statistics are off unless the user turns them on.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if address != "auto":
        # Ray would prefer it over the given address.
        os.environ.pop("RAY_ADDRESS", None)
    import ray

    if ray.is_initialized():
        return False
    if address:
        _check_reachable(address)
    on_start(_start_line(address, num_workers))
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
    return True


def _start_line(address: str | None, num_workers: int | None) -> str:
    if address:
        return f"Joining the Ray cluster at {address} …"
    if num_workers is None:
        return "Starting Ray on this machine …"
    return f"Starting Ray with {num_workers} {'worker' if num_workers == 1 else 'workers'} …"


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
