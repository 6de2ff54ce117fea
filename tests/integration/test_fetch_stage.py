"""The fetch stage: same output after kills, placeholders removed, bounded memory."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from d2i.cluster import Session
from d2i.fault_injection import Fault, Point
from d2i.fetch.sources import NetworkPolicy
from d2i.preprocess.job import PreprocessRequest
from d2i.preprocess.job import preprocess as run_job
from d2i.preprocess.ledger import read_ledger
from d2i.recipes import resolve_recipe
from d2i.shards import ShardReader, verify
from tests.integration.chats import noise_image, reasons, sends, write_chats
from tests.integration.commands import preprocess
from tests.processes import run_process
from tests.servers import Answer, WebServer, running
from tests.shared import needs_shared

pytestmark = needs_shared
NUM_PER_SHARD = ("--set", "preprocess.num_samples_per_shard=3")


def outcome(out: Path) -> tuple[dict[str, bytes], list[dict[str, Any]]]:
    """Return all files that a reader sees, and the ledger rows without their times."""
    files = {p.name: p.read_bytes() for p in (out / "test").iterdir() if p.is_file()}
    rows = [asdict(row) for row in read_ledger(str(out / "test"))]
    return files, [{**row, "time_s": None} for row in rows]


def chats_of(server: WebServer) -> dict[str, list[str]]:
    host = f"127.0.0.1:{server.port}"
    return {f"c{path[1:]}": [f"http://{host}{path}"] for path in server.answers}


# A worker that encodes and writes, and one that fetches.
@pytest.mark.soak
@pytest.mark.parametrize(
    ("point", "nth"),
    [("shard.tar", 3), ("fetch.picture", 8)],
)
def test_killed_ray_workers_change_no_output(
    tmp_path: Path, settings: list[str], point: Point, nth: int
) -> None:
    answers = {f"/{n}": sends(noise_image(size=(64 + n, 64))) for n in range(12)}
    with running(WebServer("127.0.0.1", answers | {"/gone": sends(b"", 404)})) as web:
        source = write_chats(tmp_path / "chats", chats_of(web))
        recipe = resolve_recipe("demo", [*settings, *NUM_PER_SHARD][1::2])
        network_policy = NetworkPolicy(frozenset({f"127.0.0.1:{web.port}"}))

        def result(name: str, fault: Fault | None, num_workers: int) -> Any:
            out = tmp_path / name
            run_job(
                PreprocessRequest("jsonl", str(source), str(out), recipe),
                Session(num_workers, fault=fault),
                lambda _: None,
                network_policy=network_policy,
            )
            return outcome(out)

        with Session(2) as session:
            session.start()
            expected = result("whole", None, 0)
            assert result("killed", Fault(point, "kill", nth), 2) == expected


def test_same_image_at_many_urls_is_placeholder(tmp_path: Path, settings: list[str]) -> None:
    """Counted across shards, in any order; a retry recognizes the placeholder again."""
    good: dict[str, Answer] = {f"/{n}": sends(noise_image(size=(64 + n, 64))) for n in range(8)}
    gone = {f"/gone{n}": sends(noise_image("PNG", (70, 70))) for n in range(12)}
    late = {"/late": sends(b"", 500)}
    with running(WebServer("127.0.0.1", good | gone | late)) as web:
        source = write_chats(tmp_path / "chats", chats_of(web))
        extra = ("--allow-host", f"127.0.0.1:{web.port}", *settings, *NUM_PER_SHARD)
        failures = {"http_500": 1, "placeholder": 12}
        whole = preprocess("jsonl", source, tmp_path / "whole", *extra)["test"]
        assert whole["failures"] == failures
        assert whole["hosts"] == [{"host": "127.0.0.1", "failures": failures}]

        num_shards = whole["num_shards"]
        # Killed after the last shard before any retraction, then in the middle of the retractions.
        for point in (f"job.shard_done:kill:{num_shards}", "same_pictures.record_removed:kill:2"):
            killed = run_process(
                *("preprocess", "--corpus", "jsonl", "--source", source, "--out", tmp_path / "out"),
                *("--recipe", "demo", "--workers", "0", *extra, "--fault", point),
            )
            assert killed.returncode == -signal.SIGKILL, killed.stderr
        preprocess("jsonl", source, tmp_path / "out", *extra)
        assert outcome(tmp_path / "out") == outcome(tmp_path / "whole")
        assert not verify(str(tmp_path / "out" / "test")).problems
        assert len(ShardReader(str(tmp_path / "out" / "test"))) == len(good)

        tars = {path: path.read_bytes() for path in tmp_path.glob("whole/test/*.tar")}
        web.answers["/late"] = gone["/gone0"]
        again = preprocess("jsonl", source, tmp_path / "whole", "--retry-failed", *extra)["test"]
        assert again["failures"] == {"placeholder": 13}
        assert reasons(tmp_path / "whole")["clate"] == "placeholder"
        assert {path: path.read_bytes() for path in tars} == tars


def test_identical_local_files_are_not_placeholders(tmp_path: Path, settings: list[str]) -> None:
    source = tmp_path / "chats"
    source.mkdir()
    for n in range(12):
        (source / f"{n}.jpg").write_bytes(noise_image())
    lines = [
        {"id": f"c{n}", "turns": [{"text": "look", "images": [f"{n}.jpg"]}]} for n in range(12)
    ]
    (source / "test.jsonl").write_text("\n".join(map(json.dumps, lines)))
    done = preprocess("jsonl", source, tmp_path / "out", *settings)["test"]
    assert done["num_written"] == 12


STREAM = """
import json, resource, sys
from d2i.cluster import Session
from d2i.fetch.rate_limiter import create_shared_limiter
from d2i.fetch.sources import PUBLIC_NETWORK, ImageSource, build_rate_limiter
from d2i.preprocess.workers.fetch_worker import FetchWorkerBuilder
from d2i.preprocess.workers.messages import ShardTask
from d2i.preprocess.plan.planner import PlanRequest, make_plan
from d2i.preprocess.progress import Tally
from d2i.recipes import resolve_recipe

source, out = sys.argv[1:3]
recipe = resolve_recipe("demo", ["image.resolution=256", "preprocess.num_samples_per_shard=1000"])
make_plan(PlanRequest("jsonl", source, "test", recipe), out)
hosts = create_shared_limiter(build_rate_limiter(recipe.fetch), Session(0))
pictures = ImageSource(source, recipe.fetch, PUBLIC_NETWORK, hosts)
worker = FetchWorkerBuilder(pictures, recipe, Session(0).shared(Tally()))()
num = sum(len(block.images) for block in worker.stream(ShardTask(out, 0)))
print(json.dumps([num, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024]))
"""


def test_fetch_memory_does_not_grow_with_number_of_images(tmp_path: Path) -> None:
    peaks_mib = []
    for num in (64, 640):
        source = tmp_path / f"chats{num}"
        source.mkdir()
        data = noise_image(size=(300, 300))
        for n in range(num):
            (source / f"{n}.jpg").write_bytes(data)
        lines = [
            {"id": f"c{n}", "turns": [{"text": "look", "images": [f"{n}.jpg"]}]} for n in range(num)
        ]
        (source / "test.jsonl").write_text("\n".join(map(json.dumps, lines)))
        command = [sys.executable, "-c", STREAM, source, tmp_path / f"out{num}"]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found, peak_mib = json.loads(done.stdout)
        assert found == num
        peaks_mib.append(peak_mib)
    # 640 images of 256x256 pixels are 126 MB.
    assert peaks_mib[1] - peaks_mib[0] < 40
