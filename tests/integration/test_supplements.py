"""`--retry-failed` against hosts that recover: fetches only the missing images, each key once."""

from __future__ import annotations

import signal
import socket
from pathlib import Path

import pytest

from d2i.preprocess.ledger import read_ledger
from d2i.shards import ShardReader, verify
from tests.integration.chats import noise_image, reasons, sends, write_chats
from tests.integration.commands import preprocess
from tests.processes import run_process
from tests.servers import WebServer, running
from tests.shared import needs_shared

pytestmark = needs_shared
NUM = 12
LATE, GONE = (1, 4, 7, 10), (2,)


def test_retry_failed_retries_only_transient_failures(tmp_path: Path, settings: list[str]) -> None:
    answers = {f"/{n}": sends(noise_image(size=(64 + n, 64))) for n in range(NUM) if n not in GONE}
    down = {f"/{n}": sends(b"", 500) for n in LATE}
    with running(WebServer("127.0.0.1", answers | down)) as web:
        host = f"127.0.0.1:{web.port}"
        chats = {f"c{n}": [f"http://{host}/{n}"] for n in range(NUM)}
        source, out = write_chats(tmp_path / "chats", chats), tmp_path / "data"
        extra = ("--allow-host", host, *settings, "--set", "preprocess.num_samples_per_shard=3")

        first = preprocess("jsonl", source, out, *extra)["test"]
        assert first["failures"] == {"http_404": len(GONE), "http_500": len(LATE)}
        shards = {path: path.read_bytes() for path in out.rglob("*.tar")}

        web.answers.update(answers)
        web.asked.clear()
        command = (
            *("preprocess", "--corpus", "jsonl", "--source", source, "--out", out),
            *("--recipe", "demo", "--workers", "0", "--retry-failed", *extra),
        )
        for point in ("shard.written", "shard.commit"):
            killed = run_process(*command, "--fault", f"{point}:kill:1")
            assert killed.returncode == -signal.SIGKILL, killed.stderr
        again = preprocess("jsonl", source, out, "--retry-failed", *extra)["test"]

        assert set(web.asked) == {f"/{n}" for n in LATE}
        assert again["num_written"] == NUM - len(GONE)
        assert again["failures"] == {"http_404": len(GONE)}
        expected = {f"c{n}": "http_404" if n in GONE else "ok" for n in range(NUM)}
        assert reasons(out) == expected
        assert {path: path.read_bytes() for path in shards} == shards
        assert not verify(str(out / "test")).problems
        assert len(set(ShardReader(str(out / "test")).keys)) == NUM - len(GONE)

        ledger = read_ledger(str(out / "test"))
        web.asked.clear()
        assert preprocess("jsonl", source, out, "--retry-failed", *extra)["test"] == again
        assert not web.asked
        assert read_ledger(str(out / "test")) == ledger


@pytest.mark.soak
def test_retry_failed_on_dead_hosts_is_not_detected_as_outage(
    tmp_path: Path, settings: list[str]
) -> None:
    """Only unreachable hosts are retried, and none of them is reachable now either."""
    closed = []
    for _ in range(10):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            closed.append(f"127.0.0.1:{listener.getsockname()[1]}")
    with running(WebServer("127.0.0.1", {"/0": sends(noise_image())})) as web:
        hosts = [f"127.0.0.1:{web.port}", *closed]
        chats = {f"c{n}": [f"http://{host}/{n}"] for n, host in enumerate(hosts)}
        source, out = write_chats(tmp_path / "chats", chats), tmp_path / "data"
        extra = (*(part for host in hosts for part in ("--allow-host", host)), *settings)
        first = preprocess("jsonl", source, out, *extra)["test"]
        again = preprocess("jsonl", source, out, "--retry-failed", *extra)["test"]
        assert first["failures"] == again["failures"] == {"connect": 10}
        assert list(reasons(out).values()).count("connect") == 10
        # And once more, next to a supplement whose rows replaced those of the shards it completes.
        assert preprocess("jsonl", source, out, "--retry-failed", *extra)["test"] == again

        (out / "test" / "plan" / "supplements.json").unlink()
        lost = run_process(
            *("preprocess", "--corpus", "jsonl", "--source", source, "--out", out),
            *("--recipe", "demo", "--workers", "0", "--retry-failed", *extra),
        )
    assert lost.returncode == 2
    assert "does not list shard 1, which an earlier --retry-failed made" in lost.stderr
