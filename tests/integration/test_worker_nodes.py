"""Nodes of a running cluster: a job waits for the first, and survives one that is lost at once."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from d2i.cluster import Session, session
from d2i.cluster.actor_pool import NUM_RETRIES
from d2i.errors import ClusterError


class DeviceReader:
    """Returns the accelerators that Ray gave to its process."""

    def run(self, _task: int) -> list[str]:
        import ray

        return list(ray.get_runtime_context().get_accelerator_ids()["GPU"])


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A cluster of a head node without cores for tasks."""
    from ray.cluster_utils import Cluster

    started = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    yield started
    started.shutdown()


def test_job_waits_for_first_worker_node_and_uses_its_accelerator(
    cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []

    def on_start(line: str) -> None:
        lines.append(line)
        if line.startswith("Waiting"):
            cluster.add_node(num_cpus=1, num_gpus=1)

    with monkeypatch.context() as patch:
        patch.setattr(session, "_WORKER_NODE_TIMEOUT_S", 0.0)
        with (
            Session(ray_address=cluster.address) as job,
            pytest.raises(ClusterError, match="no node with cores or accelerators"),
        ):
            job.capacity()
    with Session(ray_address=cluster.address, on_start=on_start) as job:
        assert list(job.map(DeviceReader, [1])) == [(1, ["0"])]
        assert job.capacity().unit == "accelerator"
    assert [line.split()[0] for line in lines] == ["Joining", "Waiting"]


NUM_LOST = NUM_RETRIES + 2


class Doubler:
    """Returns twice its task. Building it leaves a file, and waits for the file `open`."""

    def __init__(self, directory: Path) -> None:
        (directory / str(os.getpid())).touch()
        while not (directory / "open").exists():
            time.sleep(0.05)

    def run(self, task: int) -> int:
        return 2 * task


def test_node_lost_while_its_workers_are_built_does_not_end_job(
    cluster: Any, tmp_path: Path
) -> None:
    lost = cluster.add_node(num_cpus=NUM_LOST)
    with ThreadPoolExecutor(1) as thread, Session(ray_address=cluster.address) as job:
        job.start()
        tasks = range(NUM_LOST)
        results = thread.submit(lambda: dict(job.map(partial(Doubler, tmp_path), tasks)))
        wait_until(lambda: len(list(tmp_path.iterdir())) == NUM_LOST)
        pids = [path.name for path in tmp_path.iterdir()]
        cluster.remove_node(lost, allow_graceful=False)
        wait_until(lambda: not any(Path("/proc", pid).exists() for pid in pids))
        (tmp_path / "open").touch()
        cluster.add_node(num_cpus=1)
        assert results.result(120) == {task: 2 * task for task in tasks}


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not is_so():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.05)
