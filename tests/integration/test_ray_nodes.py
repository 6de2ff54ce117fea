"""Jobs of `ray job submit` on several nodes: one joins, one dies, the output is the same."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from d2i.fault_injection import WAITS
from tests.integration import evaluations
from tests.integration.logged import GATE, LOG
from tests.integration.ray_nodes import Node, RayNodes, ray_nodes, wait_until
from tests.processes import run_d2i

ROOT = Path(__file__).resolve().parents[2]
ON_CLUSTER = ("--ray-address", "auto")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayNodes]:
    directory = tmp_path_factory.mktemp("gate")
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    names = {LOG: str(directory / "drawn.txt"), GATE: str(directory / "gate"), "PYTHONPATH": path}
    with ray_nodes(names) as nodes:
        yield nodes


@pytest.fixture
def node(cluster: RayNodes) -> Iterator[Node]:
    """The only node with cores for tasks."""
    added = cluster.add()
    yield added
    for other in cluster.nodes[1:]:
        other.kill()


def preprocess_words(source: Path, out: Path, *extra: object) -> list[object]:
    return [
        *("preprocess", "--corpus", "jsonl", "--source", source, "--out", out, "--split", "test"),
        *("--recipe", "demo", "--set", "preprocess.num_samples_per_shard=4", *extra),
    ]


@pytest.fixture(scope="module")
def prepared(chat_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("prepared") / "out"
    run_d2i(*preprocess_words(chat_data.parent, out, "--workers", "0"))
    return out


@pytest.mark.parametrize(
    ("point", "nth"),
    [
        ("shard.tar", 3),
        *(
            pytest.param(point, nth, marks=pytest.mark.soak)
            for point in ("encode.images", "ledger.written", "shard.index")
            for nth in (1, 2, 5)
        ),
    ],
)
def test_preprocess_uses_joined_node_and_survives_loss_of_first(
    cluster: RayNodes,
    node: Node,
    prepared: Path,
    chat_data: Path,
    tmp_path: Path,
    point: str,
    nth: int,
) -> None:
    """A worker waits in the middle of a shard, and a joined node does the others; then it dies."""
    out = tmp_path / "out"
    fault = ("--fault", f"{point}:sleep:{nth}", "--fetch-workers", "1")
    job = submit_d2i(cluster, *preprocess_words(chat_data.parent, out, *ON_CLUSTER, *fault))
    wait_until(lambda: node.said(f"{WAITS}{point}"), job)
    assert len(list((out / "test").glob("*.commit.json"))) == nth - 1
    cluster.add()
    num_others = len(list((prepared / "test").glob("*.commit.json"))) - 1
    wait_until(lambda: len(list((out / "test").glob("*.commit.json"))) == num_others, job)
    node.kill()
    assert_succeeded(job)
    assert shards(out) == shards(prepared)


@pytest.mark.soak
def test_evaluation_survives_loss_of_ray_node_and_uses_larger_one(
    cluster: RayNodes, node: Node, whole: Path, chat_data: Path, tmp_path: Path
) -> None:
    """A worker waits before its second task; its node dies, and two on a new one do the rest."""
    out, generation_log, gate = (
        tmp_path / "out",
        *(Path(cluster.environment[name]) for name in (LOG, GATE)),
    )
    words = evaluations.command(chat_data, out, "--parallel", "--task-size", "3", *ON_CLUSTER)
    job = submit_d2i(cluster, *words)
    wait_until(lambda: len(processes(generation_log)) == 1 and bool(finished(out)), job)
    node.kill()
    cluster.add(num_cpus=2)
    wait_until(lambda: len(processes(generation_log)) == 3, job)
    gate.touch()
    assert_succeeded(job)
    evaluations.assert_same(out, whole)


def submit_d2i(cluster: RayNodes, *words: object) -> subprocess.Popen[str]:
    return cluster.submit(str(Path(sys.executable).with_name("d2i")), *words)


def assert_succeeded(job: subprocess.Popen[str]) -> None:
    output, _ = job.communicate(timeout=200)
    assert job.returncode == 0, output[-3000:]


def shards(out: Path) -> dict[str, bytes]:
    """Return every file that a reader of the data needs, by name."""
    return {path.name: path.read_bytes() for path in (out / "test").iterdir() if path.suffix}


def finished(out: Path) -> list[Path]:
    return list((out / "tasks").glob("*.npz"))


def processes(generation_log: Path) -> set[str]:
    return (
        {line.split()[1] for line in generation_log.read_text().splitlines()}
        if generation_log.exists()
        else set()
    )
