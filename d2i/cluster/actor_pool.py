"""Actor pool: Ray actors of one kind. A dead one is replaced; a new one gets tasks only once built.

It grows with the cluster, and never shrinks: actors of a lost node wait for room on another one.

Ray would restart a dead actor and leave its task with it. If its node is gone for good, that task
would wait forever while other workers are idle.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Hashable
from typing import Any

from d2i.cluster.actors import ActorSize, result_of, start_actor
from d2i.errors import ClusterError

# How often a task that crashed its worker is retried; then the job ends with an error.
NUM_RETRIES = 3


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
        self._losses: Counter[Hashable] = Counter()
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
            self.restart_worker(None, err)
        else:
            self.idle.append(actor)

    def restart_worker(self, task: Hashable, err: Exception) -> None:
        """Start a new worker for one that died in a task (None: while it was built).

        The pool or pipeline that submitted the task resubmits it.

        Raises:
            ClusterError: As in `record_failure`.
        """
        self.record_failure(task, err)
        self._spawn()

    def record_failure(self, task: Hashable, err: Exception) -> None:
        """Count a failure of a task that cost a worker or its blocks.

        Raises:
            ClusterError: If the task failed more than `NUM_RETRIES` times.
        """
        self._losses[task] += 1
        if self._losses[task] > NUM_RETRIES:
            raise ClusterError(
                f"a task crashed {NUM_RETRIES + 1} workers: {str(err).splitlines()[0]}; check for "
                "memory pressure, then run the same command again: finished work is kept"
            ) from err

    def _spawn(self) -> None:
        actor = start_actor(self._build_worker, self._size)
        self._building[actor.build.remote()] = actor
