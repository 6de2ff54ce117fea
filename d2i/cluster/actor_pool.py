"""A crew: Ray actors of one kind. Who dies is replaced, and never given a task before it is there.

Ray would restart a dead actor with its task still in hand; where its node is gone for good that one
task would wait for ever, beside workers that have nothing to do.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Hashable
from typing import Any

from d2i.cluster.actors import ActorSize, result_of, start_actor
from d2i.errors import ClusterError

# A task that takes this many more workers down with it ends the job with a clear message.
NUM_RETRIES = 3


class ActorPool:
    """Workers that are being built, and those that have nothing to do.

    Args:
        build_worker: Picklable; called in each worker's own process.
        size: What one occupies.
        num_workers: How many there are.
    """

    def __init__(self, build_worker: Callable[[], Any], size: ActorSize, num_workers: int) -> None:
        self._build_worker = build_worker
        self._size = size
        self._building: dict[Any, Any] = {}
        self._losses: Counter[Hashable] = Counter()
        self.idle: deque[Any] = deque()
        for _ in range(num_workers):
            self._spawn()

    def pending(self) -> list[Any]:
        """Return what is ready once another worker is there."""
        return list(self._building)

    def is_building(self, reference: Any) -> bool:
        """Say whether a reference is one of `pending`."""
        return reference in self._building

    def on_ready(self, reference: Any) -> None:
        """Take in a worker that is there now, or replace it if it died on the way.

        Raises:
            D2IError: If it was told so while it was built.
            ClusterError: If workers keep dying while they are built.
        """
        import ray

        actor = self._building.pop(reference)
        try:
            result_of(reference)
        except ray.exceptions.RayActorError as err:
            self.replace(None, err)
        else:
            self.idle.append(actor)

    def replace(self, task: Hashable, err: Exception) -> None:
        """Hire a new worker for one that died in a task (None: while it was built).

        Raises:
            ClusterError: As `record_failure`.
        """
        self.record_failure(task, err)
        self._spawn()

    def record_failure(self, task: Hashable, err: Exception) -> None:
        """Count what a task has cost.

        Raises:
            ClusterError: If it cost too much.
        """
        self._losses[task] += 1
        if self._losses[task] > NUM_RETRIES:
            raise ClusterError(
                f"a task took {NUM_RETRIES + 1} workers down with it: {str(err).splitlines()[0]}; "
                "expected it to finish; look for memory pressure, then repeat the command: "
                "finished work is kept"
            ) from err

    def _spawn(self) -> None:
        actor = start_actor(self._build_worker, self._size)
        self._building[actor.build.remote()] = actor
