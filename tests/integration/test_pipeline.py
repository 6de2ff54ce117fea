"""Two-stage pipeline on real Ray: every task finishes once with all its blocks, despite deaths."""

from __future__ import annotations

import itertools
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from d2i.cluster import JobFault, Session, SharedActor, pool
from d2i.cluster.actor_pool import ActorPool
from d2i.errors import ClusterError, ConfigError
from d2i.fault_injection import Fault, Point

ROOT = Path(__file__).resolve().parents[2]
NUM_TASKS, NUM_BLOCKS = 6, 5


@dataclass(frozen=True)
class NumberProducer:
    """Yields the numbers of a task's range, in a random order at each attempt."""

    fault: JobFault | None = None

    def stream(self, task: int) -> Iterator[int]:
        numbers = list(range(task, task + NUM_BLOCKS))
        random.shuffle(numbers)
        for number in numbers:
            if self.fault:
                self.fault.trigger_at("fetch.picture")
            yield number


@dataclass(frozen=True)
class SortingConsumer:
    """Returns the sorted blocks of a task."""

    fault: JobFault | None = None

    def run(self, _task: int, blocks: Iterable[int]) -> list[int]:
        found = sorted(blocks)
        if self.fault:
            self.fault.trigger_at("encode.images")
        return found


class SelfKillingProducer:
    """Kills its own process."""

    def stream(self, task: int) -> Iterator[int]:
        yield task
        os.kill(os.getpid(), signal.SIGKILL)


def raise_config_error(error: str) -> SortingConsumer:
    raise ConfigError(error)


@pytest.fixture(scope="module", autouse=True)
def ray_is_up() -> Iterator[list[str]]:
    """Start Ray, and yield the lines that said so."""
    lines: list[str] = []
    with Session(2, on_start=lines.append) as session:
        session.start()
        session.start()
        yield lines


def test_start_of_ray_is_announced_once(ray_is_up: list[str]) -> None:
    assert ray_is_up == ["Starting Ray with 2 workers …"]
    # Nothing starts here: Ray already runs.
    with Session(1, on_start=ray_is_up.append) as session:
        session.start()
    assert len(ray_is_up) == 1


@pytest.mark.parametrize(
    ("point", "nth"), [("fetch.picture", 1), ("fetch.picture", 13), ("encode.images", 3)]
)
def test_actor_pool_replaces_killed_worker(point: Point, nth: int) -> None:
    session = Session(2, fault=Fault(point, "kill", nth))
    fault = session.job_fault
    assert fault is not None
    producer, consumer = partial(NumberProducer, fault), partial(SortingConsumer, fault)
    results = list(session.pipeline(producer, consumer, range(NUM_TASKS)))
    assert sorted(task for task, _ in results) == list(range(NUM_TASKS))
    assert all(found == list(range(task, task + NUM_BLOCKS)) for task, found in results)
    assert fault.passes.call("__getattribute__", "num_passed") >= nth, "it was reached"


def test_pipeline_without_ray_gives_same_result() -> None:
    waited: list[None] = []
    found = Session(0).pipeline(
        NumberProducer, SortingConsumer, range(NUM_TASKS), lambda: waited.append(None)
    )
    results = dict(found)
    assert results == {task: list(range(task, task + NUM_BLOCKS)) for task in range(NUM_TASKS)}
    assert len(waited) == NUM_TASKS * NUM_BLOCKS


def test_pipeline_raises_error_of_consumer_constructor() -> None:
    consumer = partial(raise_config_error, "no such weights")
    with pytest.raises(ConfigError, match="no such weights"):
        list(Session(2).pipeline(NumberProducer, consumer, range(NUM_TASKS)))


def test_actor_pool_stops_job_when_task_kills_every_worker() -> None:
    with pytest.raises(ClusterError, match="crashed 4 workers"):
        list(Session(1).pipeline(SelfKillingProducer, SortingConsumer, [1]))


def test_pipeline_with_more_workers_than_cores_does_not_deadlock() -> None:
    session = Session(2, num_producers=5)
    results = list(session.pipeline(NumberProducer, SortingConsumer, range(NUM_TASKS)))
    assert len(results) == NUM_TASKS


class Doubler:
    """Returns twice its task."""

    def run(self, task: int) -> int:
        return 2 * task


def test_map_starts_no_worker_without_task_when_cluster_grows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fitting = itertools.chain([1], itertools.repeat(5))
    started: list[ActorPool] = []

    class NotedPool(ActorPool):
        def __init__(self, *words: Any) -> None:
            super().__init__(*words)
            started.append(self)

    monkeypatch.setattr(pool, "num_workers_of", lambda *_: next(fitting))
    monkeypatch.setattr(pool, "_TICK_S", 0.0)
    monkeypatch.setattr(pool, "ActorPool", NotedPool)
    assert sorted(Session().map(Doubler, range(3))) == [(0, 0), (1, 2), (2, 4)]
    assert started[0].num_workers == 3


class NodeKiller:
    """Kills its own node and never returns."""

    def run(self, _task: int, _blocks: Iterable[int] = ()) -> None:
        os.kill(os.getppid(), signal.SIGKILL)
        signal.pause()


def kill_own_node(kind: str) -> None:
    """Run a job whose own node dies; print its error."""
    try:
        with Session(1) as session:
            holder: SharedActor[list[int]] = session.shared([])
            if kind == "stages":
                on_wait = partial(holder.call, "append", 1)
                list(session.pipeline(NumberProducer, NodeKiller, [0, 1], on_wait))
            else:
                list(session.map(NodeKiller, [0, 1]))
    except ClusterError as err:
        sys.stdout.write(f"{err}\n")


@pytest.mark.parametrize("kind", ["stages", "tasks"])
def test_death_of_own_ray_node_ends_job_with_error(kind: str) -> None:
    code = f"from tests.integration.test_pipeline import kill_own_node; kill_own_node({kind!r})"
    # By default Ray takes 15 seconds to notice.
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
