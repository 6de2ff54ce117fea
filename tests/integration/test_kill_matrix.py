"""Driver, worker or node killed at every fault point: the same command resumes to the same bytes.

One run for each pair of victim and fault point, at a pass drawn from a seed. `make soak` runs all
of them, `make test` one; test_ray_nodes.py kills a node there too.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import pytest

from d2i.cluster import Session
from d2i.fault_injection import Point
from d2i.preprocess.ledger import read_ledger
from d2i.shards import ShardReader, verify
from tests.integration.chats import noise_image, sends, write_chats
from tests.integration.killing import run_job
from tests.servers import WebServer, running
from tests.shared import needs_shared

pytestmark = needs_shared
ROOT = Path(__file__).resolve().parents[2]
NUM_GOOD, NUM_SAME = 8, 4
# How often the corpus below passes each fault point, with 13 images in 5 shards, 4 of which get
# retractions.
PASSES = {
    "fetch.picture": 13,
    "fetch.shard": 4,
    "encode.images": 4,
    "ledger.written": 4,
    "shard.written": 4,
    "shard.tar": 4,
    "shard.index": 4,
    "shard.commit": 4,
    "same_pictures.record_removed": 2,
}
DRIVER_PASSES = {"job.shard_done": 4, "manifest.checksum": 1, "manifest.written": 1}
RUNS = [
    *((victim, point) for victim in ("driver", "worker", "node") for point in PASSES),
    *(("driver", point) for point in DRIVER_PASSES),
]
SAMPLE = ("driver", "shard.index")


def test_every_fault_point_is_killed_at_by_some_test() -> None:
    elsewhere = {*get_args(Point)} - {*PASSES, *DRIVER_PASSES}
    others = (path for path in Path(__file__).parent.glob("test_*.py") if path != Path(__file__))
    tests = "".join(path.read_text() for path in others)
    assert {*PASSES, *DRIVER_PASSES} < {*get_args(Point)}
    assert [point for point in elsewhere if not re.search(rf'"{point}[":]', tests)] == []


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, settings: list[str]) -> Iterator[dict[str, Any]]:
    """A corpus of URLs, four of which serve the same image; and its undisturbed output."""
    directory = tmp_path_factory.mktemp("killed")
    answers = {f"/{n}": sends(noise_image(size=(64 + n, 64))) for n in range(NUM_GOOD)}
    answers |= {f"/same{n}": sends(noise_image("PNG", (70, 70))) for n in range(NUM_SAME)}
    with running(WebServer("127.0.0.1", answers | {"/gone": sends(b"", 404)})) as web:
        host = f"127.0.0.1:{web.port}"
        urls = {f"c{path[1:]}": [f"http://{host}{path}"] for path in web.answers}
        values = {
            "source": str(write_chats(directory / "chats", urls)),
            "out": str(directory / "whole"),
            "host": host,
            "settings": [
                *settings[1::2],
                "preprocess.num_samples_per_shard=3",
                f"fetch.num_same_pictures={NUM_SAME}",
            ],
        }
        run_job(values, Session(0))
        yield values


def outcome(out: Path) -> tuple[dict[str, bytes], list[dict[str, Any]]]:
    """Return the files by name (Parquet files without content), and the ledger without times."""
    split = out / "test"
    files = {
        str(path.relative_to(split)): b"" if ".parquet" in path.name else path.read_bytes()
        for path in split.rglob("*")
        if path.is_file()
    }
    rows = [asdict(row) for row in read_ledger(str(split))]
    return files, [{**row, "time_s": None} for row in rows]


@pytest.mark.parametrize(
    ("victim", "point"),
    [pytest.param(*run, marks=[] if run == SAMPLE else pytest.mark.soak) for run in RUNS],
)
@pytest.mark.timeout(900)
def test_restarted_preprocess_gives_same_bytes_after_kill(
    victim: str, point: str, job: dict[str, Any], tmp_path: Path
) -> None:
    nth = random.Random(f"{victim} {point}").randint(1, (PASSES | DRIVER_PASSES)[point])
    done = tmp_path / "done"
    values = job | {"out": str(tmp_path / "out")}
    asked = {"victim": victim, "point": point, "nth": nth, "done": str(done)}
    command = [sys.executable, "-m", "tests.integration.killing", json.dumps(values | asked)]
    with (tmp_path / "log").open("w+") as log:
        killed = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
        try:
            killed.wait(300)
        finally:
            # Kill the whole group of a job that still waits for a node.
            if killed.poll() is None:
                os.killpg(killed.pid, signal.SIGKILL)
                killed.wait()
        log.seek(0)
        assert done.exists(), (nth, log.read()[-3000:])
    if done.read_text() == "other":
        assert killed.returncode == 0, "the job goes on without it"
    run_job(values, Session(0))
    assert outcome(Path(values["out"])) == outcome(Path(job["out"]))
    split = f"{values['out']}/test"
    assert verify(split).ok
    keys = list(ShardReader(split).keys)
    assert len(keys) == len(set(keys)) == NUM_GOOD
