"""Two-stage pipeline: producers stream the blocks of a task, consumers take them and finish it.

Each stage has its own workers, so that each scales on its own. Blocks pass through Ray's object
store, never through the driver. A task whose producer or blocks are lost is produced again.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeVar

from d2i.cluster.actor_pool import ActorPool
from d2i.cluster.actors import (
    ActorSize,
    ResourceRequest,
    actor_size,
    check_own_node,
    num_cluster_cores,
    num_workers_of,
    result_of,
)

TaskT = TypeVar("TaskT")
BlockT = TypeVar("BlockT")
ResultT = TypeVar("ResultT")
TaskIn = TypeVar("TaskIn", contravariant=True)
TakenBlock = TypeVar("TakenBlock", contravariant=True)
GivenBlock = TypeVar("GivenBlock", covariant=True)
ResultOut = TypeVar("ResultOut", covariant=True)

_TICK_S = 1.0
# Producers reserve no core: a waiting one could take that of a consumer which died.
_PRODUCER_SIZE = ActorSize(0.0, 0.0)


class Producer(Protocol[TaskIn, GivenBlock]):
    """First stage: built once per process, called once per task."""

    def stream(self, task: TaskIn) -> Iterator[GivenBlock]:
        """Yield the blocks of one task as they come; may be called again for the same task."""
        ...


class Consumer(Protocol[TaskIn, TakenBlock, ResultOut]):
    """Second stage: built once per process, called once per task."""

    def run(self, task: TaskIn, blocks: Iterable[TakenBlock]) -> ResultOut:
        """Finish one task; may be called again after a worker has died in it."""
        ...


def pipeline_here(
    build_producer: Callable[[], Producer[TaskT, BlockT]],
    build_consumer: Callable[[], Consumer[TaskT, BlockT, ResultT]],
    tasks: Sequence[TaskT],
    on_wait: Callable[[], None],
) -> Iterator[tuple[TaskT, ResultT]]:
    """Yield (task, result) of each task, run in this process."""
    consumer, producer = build_consumer(), build_producer()

    def noticed(blocks: Iterator[BlockT]) -> Iterator[BlockT]:
        for block in blocks:
            on_wait()
            yield block

    for task in tasks:
        yield task, consumer.run(task, noticed(producer.stream(task)))


def pipeline_on_ray(
    build_producer: Callable[[], Producer[TaskT, BlockT]],
    build_consumer: Callable[[], Consumer[TaskT, BlockT, ResultT]],
    tasks: Sequence[TaskT],
    on_wait: Callable[[], None],
    *,
    num_consumers: int | None,
    num_producers: int | None,
) -> Iterator[tuple[TaskT, ResultT]]:
    """Yield (task, result) as tasks finish, in any order, each task exactly once.

    In flight are at most the tasks being produced, one waiting for each consumer, and those being
    consumed: that bounds the blocks in the object store.

    Args:
        build_producer: Picklable; called in the producer's own process.
        build_consumer: Picklable; called in the consumer's own process, as soon as the job starts.
        tasks: Tasks to run, at least one.
        on_wait: Called about once a second.
        num_consumers: `None` takes one per accelerator, or per core if there is none, also of nodes
            that join later.
        num_producers: `None` takes one for each core that no consumer occupies; without
            accelerators, as many as there are consumers, with which they share the cores.

    Raises:
        ClusterError: If workers keep dying.
        D2IError: Any that a task raised for the user to fix.
    """
    size = actor_size(ResourceRequest())
    fitting = _num_workers(num_consumers, num_producers, size, len(tasks), num_built=0)
    # Built right away, so that their errors show before producers have run for hours.
    consumers = ActorPool(build_consumer, size, fitting.consumers)
    producers = ActorPool(build_producer, _PRODUCER_SIZE, fitting.producers)
    scheduler = _PipelineScheduler(consumers, producers, tasks)
    next_tick = time.monotonic()
    while scheduler.num_left:
        scheduler.submit()
        ready = _ready(scheduler.pending())
        if not ready:
            check_own_node()
        if time.monotonic() >= next_tick:
            on_wait()
            fitting = _num_workers(
                num_consumers,
                num_producers,
                size,
                scheduler.num_left,
                num_built=consumers.num_workers,
            )
            consumers.grow(fitting.consumers)
            producers.grow(fitting.producers)
            next_tick = time.monotonic() + _TICK_S
        for reference in ready:
            yield from scheduler.collect(reference)


class _NumWorkers(NamedTuple):
    """Number of workers of each stage."""

    consumers: int
    producers: int


def _num_workers(
    num_consumers: int | None,
    num_producers: int | None,
    size: ActorSize,
    num_tasks: int,
    *,
    num_built: int,
) -> _NumWorkers:
    """Return how many workers of each stage fit the cluster as it is now, and have a task.

    The consumers that there are, `num_built`, occupy their cores also without a task.
    """
    consumers = max(min(num_workers_of(num_consumers, size), num_tasks), num_built)
    if num_producers is None:
        idle_cores = max(1, num_cluster_cores() - consumers)
        num_producers = idle_cores if size.num_gpus else consumers
    return _NumWorkers(consumers, min(num_producers, num_tasks))


def _ready(references: list[Any]) -> list[Any]:
    """Return all references that are ready; wait up to `_TICK_S` for the first.

    Taken one at a time, each block would cost a scan of thousands of streams.
    """
    import ray

    ready, _ = ray.wait(references, num_returns=len(references), timeout=0, fetch_local=False)
    if not ready:
        ready, _ = ray.wait(references, num_returns=1, timeout=_TICK_S, fetch_local=False)
    return list(ready)


@dataclass
class _Stream:
    """Task being produced, by its number, with its blocks so far."""

    number: int
    actor: Any
    blocks: list[Any] = field(default_factory=list)


class _PipelineScheduler:
    """State of each task on Ray. Tasks are known here by their numbers."""

    def __init__(self, consumers: ActorPool, producers: ActorPool, tasks: Sequence[Any]) -> None:
        self._consumers, self._producers = consumers, producers
        self._tasks = tasks
        self._waiting = deque(range(len(tasks)))
        self._streams: dict[Any, _Stream] = {}
        self._produced: deque[_Stream] = deque()
        self._consuming: dict[Any, tuple[Any, _Stream]] = {}
        self.num_left = len(tasks)

    def pending(self) -> list[Any]:
        """Return all references that may be ready next."""
        building = [*self._consumers.pending(), *self._producers.pending()]
        return [*building, *self._consuming, *self._streams]

    def submit(self) -> None:
        """Give work to idle workers, unless too many tasks wait for a consumer."""
        # Consumers first: that makes room for the next task to be produced.
        while self._produced and self._consumers.idle:
            actor, stream = self._consumers.idle.popleft(), self._produced.popleft()
            task = self._tasks[stream.number]
            self._consuming[actor.finish.remote(task, stream.blocks)] = (actor, stream)
        max_produced = self._consumers.num_workers
        while self._waiting and self._producers.idle and len(self._produced) < max_produced:
            actor, number = self._producers.idle.popleft(), self._waiting.popleft()
            self._streams[actor.stream.remote(self._tasks[number])] = _Stream(number, actor)

    def collect(self, reference: Any) -> Iterator[tuple[Any, Any]]:
        """Process a ready reference; yield its task and result if one is finished."""
        for pool in (self._consumers, self._producers):
            if pool.is_building(reference):
                pool.on_ready(reference)
                return
        if reference in self._streams:
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
            result_of(generator.completed())
        except ray.exceptions.RayActorError as err:
            # Ray itself would go on with the block after the last, but the order may differ.
            self._producers.restart_worker(stream.number, stream.actor, err)
            self._waiting.append(stream.number)
        else:
            self._producers.idle.append(stream.actor)
            self._produced.append(stream)

    def _take_result(self, reference: Any) -> Iterator[tuple[Any, Any]]:
        import ray

        actor, stream = self._consuming.pop(reference)
        try:
            result = result_of(reference)
        except ray.exceptions.RayActorError as err:
            # Its blocks are still there, for the next idle consumer.
            self._consumers.restart_worker(stream.number, actor, err)
            self._produced.appendleft(stream)
            return
        except ray.exceptions.RayTaskError as err:
            if not isinstance(err.cause, ray.exceptions.ObjectLostError):
                raise
            # The node that held its blocks is gone.
            self._producers.record_failure(stream.number, stream.actor, err)
            self._waiting.append(stream.number)
        else:
            self.num_left -= 1
            yield self._tasks[stream.number], result
        self._consumers.idle.append(actor)
