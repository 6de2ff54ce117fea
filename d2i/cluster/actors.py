"""One worker as a Ray actor: its resources, its start and the results of its tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from d2i.errors import ClusterError, D2IError

_ANSWER_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class ResourceRequest:
    """Resources of one worker. Accelerators are used if the cluster has any."""

    num_cpus: float = 1.0
    num_gpus: float = 1.0


@dataclass(frozen=True)
class ActorSize:
    """Resources of one actor on the current cluster."""

    num_cpus: float
    num_gpus: float


def actor_size(resources: ResourceRequest) -> ActorSize:
    """Return the resources of a worker, without an accelerator if the cluster has none."""
    import ray

    has_gpus = bool(ray.cluster_resources().get("GPU", 0))
    return ActorSize(resources.num_cpus, resources.num_gpus if has_gpus else 0.0)


def num_cluster_cores() -> int:
    """Return the cores of all nodes of the running cluster."""
    import ray

    return int(ray.cluster_resources().get("CPU", 1))


def num_workers_of(requested: int | None, size: ActorSize) -> int:
    """Return the number of workers: as requested, or as many as fit."""
    import ray

    if requested:
        return requested
    total = ray.cluster_resources()
    if size.num_gpus:
        return max(1, int(total.get("GPU", 0) // size.num_gpus))
    return max(1, int(total.get("CPU", 1) // size.num_cpus))


def start_actor(build_worker: Callable[[], Any], size: ActorSize) -> Any:
    """Start an actor that Ray does not restart when it dies."""
    import ray

    options = ray.remote(
        num_cpus=size.num_cpus,
        num_gpus=size.num_gpus,
        max_restarts=0,
        max_task_retries=0,
        # Ray would fill one node after the other with actors that request no resources.
        scheduling_strategy="SPREAD",
    )
    return options(_WorkerActor).remote(build_worker)


def result_of(reference: Any) -> Any:
    """Return the result of an actor's task.

    Raises:
        D2IError: If the task raised it.
        ClusterError: As in `check_own_node`.
        ray.exceptions.RayActorError: If its worker died.
    """
    import ray

    try:
        return get(reference)
    except ray.exceptions.RayTaskError as err:
        if isinstance(err.cause, D2IError):
            raise type(err.cause)(str(err.cause)) from err
        raise


def get(reference: Any) -> Any:
    """Return an object as `ray.get` does, but do not wait for one that cannot come.

    Raises:
        ClusterError: As in `check_own_node`.
    """
    import ray

    while True:
        try:
            return ray.get(reference, timeout=_ANSWER_TIMEOUT_S)
        except ray.exceptions.GetTimeoutError:
            check_own_node()
        except ray.exceptions.RayActorError:
            # If this node is dead, Ray counts the owner of the actor as dead, and so the actor.
            check_own_node()
            raise


def check_own_node() -> None:
    """Check that the Ray node that this process uses is alive.

    Without it nothing becomes ready any more, and Ray itself would wait forever.

    Raises:
        ClusterError: If it is dead.
    """
    import ray

    own = ray.get_runtime_context().get_node_id()
    if any(node["NodeID"] == own and not node["Alive"] for node in ray.nodes()):
        raise ClusterError(
            "Ray's node on this machine died during the job; check for memory pressure, "
            "then run the same command again: finished work is kept"
        )


class _WorkerActor:
    """Ray actor that holds a worker.

    The worker is built by a task of its own, so that an error in building reaches the driver as
    such.
    """

    def __init__(self, build_worker: Callable[[], Any]) -> None:
        self._build_worker = build_worker
        self._worker: Any = None

    def node_id(self) -> str:
        import ray

        return str(ray.get_runtime_context().get_node_id())

    def build(self) -> None:
        self._worker = self._build_worker()

    def run(self, task: Any) -> Any:
        return self._worker.run(task)

    def stream(self, task: Any) -> Iterator[Any]:
        yield from self._worker.stream(task)

    def finish(self, task: Any, blocks: list[Any]) -> Any:
        import ray

        # One at a time, so that finished blocks leave this process's memory.
        return self._worker.run(task, (ray.get(block) for block in blocks))
