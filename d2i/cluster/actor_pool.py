"""Actor pool: Ray actors of one kind. A dead one is replaced; a new one gets tasks only once built.

It grows with the cluster, and never shrinks: actors of a lost node wait for room on another one.

Ray would restart a dead actor and leave its task with it. If its node is gone for good, that task
would wait forever while other workers are idle.
"""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Callable, Collection, Hashable
from typing import Any

from d2i.cluster.actors import ActorSize, result_of, start_actor
from d2i.cluster.nodes import dead_node_ids
from d2i.errors import ClusterError

# How often a task that crashed its worker is retried; then the job ends with an error.
NUM_RETRIES = 3
# By default Ray counts a node as dead at most so long after its last answer.
_NODE_DEATH_TIMEOUT_S = 30.0
_TICK_S = 0.5
_NODE_OF_DEAD_ACTOR = re.compile(r"its node has died\. Node Id: (\w+)")


class WorkerLosses:
    """Workers lost in each task, by their node; None: a node that never answered."""

    def __init__(self) -> None:
        self._nodes: dict[Hashable, list[str | None]] = {}

    def add(self, task: Hashable, node_id: str | None) -> None:
        """Add the loss of a worker, or of its blocks, in a task."""
        self._nodes.setdefault(task, []).append(node_id)

    def clear(self, task: Hashable) -> None:
        """Forget the losses of a task."""
        self._nodes.pop(task, None)

    def nodes(self, task: Hashable) -> set[str | None]:
        """Return the nodes on which a task had losses."""
        return set(self._nodes.get(task, ()))

    def count(self, task: Hashable, dead: Collection[str]) -> int:
        """Return the number of losses of a task; all of a dead node are one."""
        nodes = self._nodes.get(task, [])
        return sum(node not in dead for node in nodes) + len(self.nodes(task) & set(dead))


class ActorPool:
    """Workers that are being built, and idle workers.

    Args:
        build_worker: Picklable; called in each worker's own process.
        size: Resources of one worker.
        num_workers: Number of workers at first.
    """

    def __init__(self, build_worker: Callable[[], Any], size: ActorSize, num_workers: int) -> None:
        self._build_worker = build_worker
        self._size = size
        self.num_workers = 0
        self._building: dict[Any, Any] = {}
        self._losses = WorkerLosses()
        self._node_ids: dict[Any, Any] = {}
        self.idle: deque[Any] = deque()
        self.grow(num_workers)

    def grow(self, num_workers: int) -> None:
        """Start as many workers as are missing to that number, if any."""
        while self.num_workers < num_workers:
            self._spawn()
            self.num_workers += 1

    def pending(self) -> list[Any]:
        """Return one reference per worker being built; it is ready once the worker is."""
        return list(self._building)

    def is_building(self, reference: Any) -> bool:
        """Return whether a reference is one of `pending`."""
        return reference in self._building

    def on_ready(self, reference: Any) -> None:
        """Add a built worker to the idle ones, or replace it if it died while it was built.

        Raises:
            D2IError: If building it raised one.
            ClusterError: If workers keep dying while they are built.
        """
        import ray

        actor = self._building.pop(reference)
        try:
            result_of(reference)
        except ray.exceptions.RayActorError as err:
            self.restart_worker(None, actor, err)
        else:
            self._losses.clear(None)
            self.idle.append(actor)

    def restart_worker(self, task: Hashable, actor: Any, err: Exception) -> None:
        """Start a new worker for one that died in a task (None: while it was built).

        The pool or pipeline that submitted the task resubmits it.

        Raises:
            ClusterError: As in `record_failure`.
        """
        self.record_failure(task, actor, err)
        self._spawn()

    def record_failure(self, task: Hashable, actor: Any, err: Exception) -> None:
        """Count a failure of a task that cost a worker or its blocks.

        A node that dies takes all its workers, and is counted once.

        Raises:
            ClusterError: If the task failed more than `NUM_RETRIES` times.
        """
        self._losses.add(task, self._node_id_of(actor, err))
        if self._has_failed(task):
            raise ClusterError(
                f"a task crashed {NUM_RETRIES + 1} workers: {str(err).splitlines()[0]}; check for "
                "memory pressure, then run the same command again: finished work is kept"
            ) from err

    def _has_failed(self, task: Hashable) -> bool:
        """Return whether a task failed too often, once it is known which of its nodes are dead."""
        import ray

        # The death of this process's own node ends the job anyway.
        own = ray.get_runtime_context().get_node_id()
        deadline = time.monotonic() + _NODE_DEATH_TIMEOUT_S
        while self._losses.count(task, dead := dead_node_ids()) > NUM_RETRIES:
            if self._losses.nodes(task) <= {own, None, *dead} or time.monotonic() >= deadline:
                return True
            time.sleep(_TICK_S)
        return False

    def _node_id_of(self, actor: Any, err: Exception) -> str | None:
        import ray

        try:
            return str(ray.get(self._node_ids[actor], timeout=0))
        except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
            # It never ran. Ray may have sent it to a node that was dead already.
            found = _NODE_OF_DEAD_ACTOR.search(str(err))
            return found and found[1]

    def _spawn(self) -> None:
        actor = start_actor(self._build_worker, self._size)
        # Asked before it may be lost.
        self._node_ids[actor] = actor.node_id.remote()
        self._building[actor.build.remote()] = actor
