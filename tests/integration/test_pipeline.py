"""Two stages on real Ray: whoever dies, every task is finished once, with all of its blocks."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from d2i.cluster import (
    JobFault,
    Pipeline,
    Pool,
    SharedActor,
    create_shared,
    job_fault,
    run_pipeline,
    run_tasks,
    session,
)
from d2i.errors import ClusterError, ConfigError
from d2i.fault_injection import Fault, Point

ROOT = Path(__file__).resolve().parents[2]
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
def test_actor_pool_replaces_a_killed_worker(point: Point, nth: int) -> None:
    fault = job_fault(Fault(point, "kill", nth), num_workers=2)
    stages = Pipeline(partial(Feeding, fault), partial(Finishing, fault), num_consumers=2)
    results = list(run_pipeline(stages, range(NUM_TASKS)))
    assert sorted(task for task, _ in results) == list(range(NUM_TASKS))
    assert all(found == list(range(task, task + NUM_BLOCKS)) for task, found in results)
    assert fault.passes.call("__getattribute__", "num_passed") >= nth, "it was reached"


def test_pipeline_without_ray_gives_the_same_result() -> None:
    waited: list[None] = []
    stages = Pipeline(Feeding, Finishing, num_consumers=0)
    results = dict(run_pipeline(stages, range(NUM_TASKS), lambda: waited.append(None)))
    assert results == {task: list(range(task, task + NUM_BLOCKS)) for task in range(NUM_TASKS)}
    assert len(waited) == NUM_TASKS * NUM_BLOCKS


def test_a_mistake_in_the_second_stage_ends_the_job_as_what_it_is() -> None:
    stages: Pipeline[int, int, list[int]] = Pipeline(
        Feeding, partial(mistaken, "no such weights"), num_consumers=2
    )
    with pytest.raises(ConfigError, match="no such weights"):
        list(run_pipeline(stages, range(NUM_TASKS)))


def test_a_task_that_kills_every_worker_ends_the_job() -> None:
    stages = Pipeline(Dying, Finishing, num_consumers=1)
    with pytest.raises(ClusterError, match="crashed 4 workers"):
        list(run_pipeline(stages, [1]))


def test_pipeline_of_more_workers_than_cores_does_not_deadlock() -> None:
    stages = Pipeline(Feeding, Finishing, num_consumers=2, num_producers=5)
    assert len(list(run_pipeline(stages, range(NUM_TASKS)))) == NUM_TASKS


class Felling:
    """Kills its node, and does not finish."""

    def run(self, _task: int, _blocks: Iterable[int] = ()) -> None:
        os.kill(os.getppid(), signal.SIGKILL)
        signal.pause()


def fell_node(kind: str) -> None:
    """The job of the test below: its own node dies, and it must end with a clear error."""
    try:
        with session(1, None):
            holder: SharedActor[list[int]] = create_shared([], num_workers=1)
            if kind == "stages":
                stages = Pipeline(Feeding, Felling, num_consumers=1)
                list(run_pipeline(stages, [0, 1], lambda: holder.call("append", 1)))
            else:
                list(run_tasks(Pool(Felling, num_workers=1), [0, 1]))
    except ClusterError as err:
        sys.stdout.write(f"{err}\n")


@pytest.mark.parametrize("kind", ["stages", "tasks"])
def test_a_job_whose_own_node_dies_ends_with_a_clear_error(kind: str) -> None:
    code = f"from tests.integration.test_pipeline import fell_node; fell_node({kind!r})"
    # Ray takes 15 seconds by itself to notice.
    quick = {"RAY_health_check_period_ms": "300", "RAY_health_check_failure_threshold": "2"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | quick,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "Ray's node on this machine died" in done.stdout, done.stderr[-2000:]
    assert "run the same command again" in done.stdout
    assert done.returncode == 0
