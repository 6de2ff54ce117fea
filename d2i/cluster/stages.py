"""Two stages in a row: feeders stream blocks of a task, workers take them and finish the task.

Each stage has workers of its own, so that each scales by what it needs. Blocks lie in Ray's
object store on their way, never in the driver. A task whose feeder or blocks are lost is fed anew.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from d2i.cluster.pool import (
    NUM_RETRIES,
    ActorSize,
    ResourceRequest,
    actor_size,
    num_workers_of,
    result_of,
    session,
    start_actor,
    too_many_deaths,
)

TaskT = TypeVar("TaskT")
BlockT = TypeVar("BlockT")
ResultT = TypeVar("ResultT")
TaskIn = TypeVar("TaskIn", contravariant=True)
TakenBlock = TypeVar("TakenBlock", contravariant=True)
GivenBlock = TypeVar("GivenBlock", covariant=True)
ResultOut = TypeVar("ResultOut", covariant=True)

_TICK_S = 1.0


class Feeder(Protocol[TaskIn, GivenBlock]):
    """The first stage: built once per process, called once per task."""

    def stream(self, task: TaskIn) -> Iterator[GivenBlock]:
        """Yield the blocks of one task as they come; it may be called again for the same task."""
        ...


class Finisher(Protocol[TaskIn, TakenBlock, ResultOut]):
    """The second stage: built once per process, called once per task."""

    def run(self, task: TaskIn, blocks: Iterable[TakenBlock]) -> ResultOut:
        """Finish one task; it may be called again after a worker has died in it."""
        ...


@dataclass(frozen=True)
class Stages(Generic[TaskT, BlockT, ResultT]):
    """Both stages, and where they run.

    Args:
        build_feeder: Picklable; called in the feeder's own process.
        build_finisher: Picklable; called in the finisher's own process, before anything is fed.
        num_finishers: `0` runs everything in this process, without Ray. `None` takes one per
            accelerator, or per core where there is none.
        num_feeders: `None` takes one for each core that no finisher occupies; where there is no
            accelerator, as many as there are finishers, with whom they share the cores.
        ray_address: As `Pool`'s.
    """

    build_feeder: Callable[[], Feeder[TaskT, BlockT]]
    build_finisher: Callable[[], Finisher[TaskT, BlockT, ResultT]]
    num_finishers: int | None = None
    num_feeders: int | None = None
    ray_address: str | None = None


def run_stages(
    stages: Stages[TaskT, BlockT, ResultT],
    tasks: Sequence[TaskT],
    on_wait: Callable[[], None] = lambda: None,
) -> Iterator[tuple[TaskT, ResultT]]:
    """Yield (task, result) as tasks finish, in any order, each task exactly once.

    In flight are at most the tasks being fed, one waiting for each finisher, and those being
    finished: that bounds the blocks in the object store.

    Args:
        stages: Who works.
        tasks: What is to be done.
        on_wait: Called about once a second, or between two blocks without Ray.

    Raises:
        ClusterError: If Ray cannot start or be reached, or workers keep dying.
        D2IError: Whatever a task raised for the user to mend.
    """
    if not tasks:
        return
    if stages.num_finishers == 0:
        yield from _run_here(stages, tasks, on_wait)
        return
    with session(stages.num_finishers, stages.ray_address):
        yield from _run_on_ray(stages, tasks, on_wait)


def _run_here(
    stages: Stages[TaskT, BlockT, ResultT], tasks: Sequence[TaskT], on_wait: Callable[[], None]
) -> Iterator[tuple[TaskT, ResultT]]:
    finisher, feeder = stages.build_finisher(), stages.build_feeder()

    def noticed(blocks: Iterator[BlockT]) -> Iterator[BlockT]:
        for block in blocks:
            on_wait()
            yield block

    for task in tasks:
        yield task, finisher.run(task, noticed(feeder.stream(task)))


def _run_on_ray(
    stages: Stages[TaskT, BlockT, ResultT], tasks: Sequence[TaskT], on_wait: Callable[[], None]
) -> Iterator[tuple[TaskT, ResultT]]:
    import ray

    flow = _Flow(stages, tasks)
    while flow.num_left:
        flow.give_out()
        ready, _ = ray.wait(flow.awaited(), num_returns=1, timeout=_TICK_S, fetch_local=False)
        on_wait()
        for reference in ready:
            yield from flow.take(reference)


@dataclass
class _Stream:
    """A task being fed: the blocks so far."""

    task: Any
    actor: Any
    blocks: list[Any] = field(default_factory=list)


class _Flow:
    """Which task is where, on Ray. Tasks are known here by their numbers."""

    def __init__(self, stages: Stages[Any, Any, Any], tasks: Sequence[Any]) -> None:
        size = actor_size(ResourceRequest())
        num_finishers = min(num_workers_of(stages.num_finishers, size), len(tasks))
        self._stages = stages
        self._feeder_size, num_feeders = _feeders(stages, num_finishers, has_gpus=size.num_gpus > 0)
        self._waiting = deque(tasks)
        self._deaths: Counter[int] = Counter()
        self._idle_feeders = [self._new_feeder() for _ in range(min(num_feeders, len(tasks)))]
        self._idle_finishers: list[Any] = []
        self._streams: dict[Any, _Stream] = {}
        self._fed: deque[_Stream] = deque()
        self._finishing: dict[Any, tuple[Any, _Stream]] = {}
        finishers = [
            start_actor(stages.build_finisher, size, num_retries=NUM_RETRIES)
            for _ in range(num_finishers)
        ]
        # Built at once: what is wrong with them is said before anything is fed for hours.
        self._building = {finisher.build.remote(): finisher for finisher in finishers}
        self._num_finishers = num_finishers
        self.num_left = len(tasks)

    def awaited(self) -> list[Any]:
        """Return all that may be ready next."""
        return [*self._building, *self._finishing, *self._streams]

    def give_out(self) -> None:
        """Give work to whoever has none, as long as not too much waits to be finished."""
        while self._waiting and self._idle_feeders and len(self._fed) < self._num_finishers:
            actor, task = self._idle_feeders.pop(), self._waiting.popleft()
            self._streams[actor.stream.remote(task)] = _Stream(task, actor)
        while self._fed and self._idle_finishers:
            actor, stream = self._idle_finishers.pop(), self._fed.popleft()
            self._finishing[actor.finish.remote(stream.task, stream.blocks)] = (actor, stream)

    def take(self, reference: Any) -> Iterator[tuple[Any, Any]]:
        """Take what is ready; yield the task and its result if one is finished."""
        if reference in self._building:
            result_of(reference)
            self._idle_finishers.append(self._building.pop(reference))
        elif reference in self._streams:
            self._take_block(reference)
        else:
            yield from self._take_result(reference)

    def _take_block(self, generator: Any) -> None:
        import ray

        stream = self._streams[generator]
        try:
            stream.blocks.append(next(generator))
        except StopIteration:
            del self._streams[generator]
        else:
            return
        try:
            ray.get(generator.completed())
        except ray.exceptions.RayActorError as err:
            # Ray itself would go on with the block after the last, but the order may be another.
            self._feed_again(stream, err)
            self._idle_feeders.append(self._new_feeder())
        except ray.exceptions.RayTaskError:
            result_of(generator.completed())
        else:
            self._idle_feeders.append(stream.actor)
            self._fed.append(stream)

    def _take_result(self, reference: Any) -> Iterator[tuple[Any, Any]]:
        import ray

        actor, stream = self._finishing.pop(reference)
        self._idle_finishers.append(actor)
        try:
            result = result_of(reference)
        except ray.exceptions.RayTaskError as err:
            if not isinstance(err.cause, ray.exceptions.ObjectLostError):
                raise
            # The node that held its blocks is gone.
            self._feed_again(stream, err)
        else:
            self.num_left -= 1
            yield stream.task, result

    def _feed_again(self, stream: _Stream, err: Exception) -> None:
        self._deaths[id(stream.task)] += 1
        if self._deaths[id(stream.task)] > NUM_RETRIES:
            raise too_many_deaths(err) from err
        self._waiting.append(stream.task)

    def _new_feeder(self) -> Any:
        return start_actor(self._stages.build_feeder, self._feeder_size, num_retries=0)


def _feeders(
    stages: Stages[Any, Any, Any], num_finishers: int, *, has_gpus: bool
) -> tuple[ActorSize, int]:
    """Return what a feeder occupies, and how many there are."""
    import ray

    num_cores = int(ray.cluster_resources().get("CPU", 1))
    if not has_gpus:
        return ActorSize(0.0, 0.0), stages.num_feeders or num_finishers
    num_cpus = ResourceRequest().num_cpus
    return ActorSize(num_cpus, 0.0), stages.num_feeders or max(1, num_cores - num_finishers)
