"""Two stages on real Ray: whoever dies, every task is finished once, with all of its blocks."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import pytest

from d2i.cluster import JobFault, Stages, job_fault, run_stages, session
from d2i.errors import ClusterError, ConfigError
from d2i.fault import Fault, Point

NUM_TASKS, NUM_BLOCKS = 6, 5


@dataclass(frozen=True)
class Feeding:
    """Yields each number of a task's range, in another order at each attempt."""

    fault: JobFault | None = None

    def stream(self, task: int) -> Iterator[int]:
        numbers = list(range(task, task + NUM_BLOCKS))
        random.shuffle(numbers)
        for number in numbers:
            if self.fault:
                self.fault.reach("fetch.picture")
            yield number


@dataclass(frozen=True)
class Finishing:
    """Gives the sorted blocks of a task."""

    fault: JobFault | None = None

    def run(self, _task: int, blocks: Iterable[int]) -> list[int]:
        found = sorted(blocks)
        if self.fault:
            self.fault.reach("encode.images")
        return found


class Dying:
    """Takes its process with it."""

    def stream(self, task: int) -> Iterator[int]:
        yield task
        os.kill(os.getpid(), signal.SIGKILL)


def mistaken(error: str) -> Finishing:
    raise ConfigError(error)


@pytest.fixture(scope="module", autouse=True)
def ray_is_up() -> Iterator[None]:
    with session(2, None):
        yield


@pytest.mark.parametrize(
    ("point", "nth"), [("fetch.picture", 1), ("fetch.picture", 13), ("encode.images", 3)]
)
def test_a_killed_worker_costs_its_task_alone(point: Point, nth: int) -> None:
    fault = job_fault(Fault(point, "kill", nth), num_workers=2)
    stages = Stages(partial(Feeding, fault), partial(Finishing, fault), num_finishers=2)
    results = list(run_stages(stages, range(NUM_TASKS)))
    assert sorted(task for task, _ in results) == list(range(NUM_TASKS))
    assert all(found == list(range(task, task + NUM_BLOCKS)) for task, found in results)
    assert fault.passes.call("__getattribute__", "num_passed") >= nth, "it was reached"


def test_without_ray_the_result_is_the_same() -> None:
    waited: list[None] = []
    stages = Stages(Feeding, Finishing, num_finishers=0)
    results = dict(run_stages(stages, range(NUM_TASKS), lambda: waited.append(None)))
    assert results == {task: list(range(task, task + NUM_BLOCKS)) for task in range(NUM_TASKS)}
    assert len(waited) == NUM_TASKS * NUM_BLOCKS


def test_a_mistake_in_the_second_stage_ends_the_job_as_what_it_is() -> None:
    stages: Stages[int, int, list[int]] = Stages(
        Feeding, partial(mistaken, "no such weights"), num_finishers=2
    )
    with pytest.raises(ConfigError, match="no such weights"):
        list(run_stages(stages, range(NUM_TASKS)))


def test_a_task_that_kills_every_worker_ends_the_job() -> None:
    stages = Stages(Dying, Finishing, num_finishers=1)
    with pytest.raises(ClusterError, match="took 4 workers down"):
        list(run_stages(stages, [1]))


def test_more_workers_than_cores_are_no_deadlock() -> None:
    stages = Stages(Feeding, Finishing, num_finishers=2, num_feeders=5)
    assert len(list(run_stages(stages, range(NUM_TASKS)))) == NUM_TASKS
