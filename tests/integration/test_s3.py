"""A run over object storage is the run over a folder: a real S3 server, real Ray workers."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import fsspec
import pytest

from d2i import storage
from d2i.errors import ConfigError
from d2i.preprocess.ledger import LedgerRow, read_ledger
from tests.processes import run_d2i, run_process
from tests.shared import SHARED, needs_shared

pytestmark = needs_shared

SOURCE = SHARED / "data" / "mmdialog"
START_S = 60.0


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """The URL of a new bucket, found as a user's would be: by the environment."""
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    monkeypatch.setenv("FSSPEC_S3_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    # fsspec read the environment when it was imported.
    monkeypatch.setitem(fsspec.config.conf, "s3", {"endpoint_url": f"http://127.0.0.1:{port}"})
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with (
        (tmp_path / "server.log").open("w") as log,
        subprocess.Popen(command, stdout=log, stderr=log) as server,
    ):
        try:
            wait_until_taken(port, server)
            fsspec.filesystem("s3").mkdir("chats")
            yield "s3://chats"
        finally:
            server.kill()
            fsspec.filesystem("s3").clear_instance_cache()


def wait_until_taken(port: int, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_S
    while server.poll() is None and time.monotonic() < deadline:
        with closing(socket.socket()) as client:
            if client.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    pytest.fail(f"no S3 server: exit code {server.poll()}")


def preprocess(source: object, out: object, settings: list[str]) -> None:
    run_d2i(
        *("preprocess", "--corpus", "mmdialog", "--source", source, "--out", out),
        *("--recipe", "demo", "--workers", "2", *settings),
        *("--set", "preprocess.num_samples_per_shard=3"),
    )


def shards(url: str) -> dict[str, bytes]:
    """Every file that a reader of the data needs, by name."""
    names = [name for name in storage.list_names(url) if Path(name).suffix]
    return {name: storage.read_bytes(storage.join(url, name)) for name in names}


def rows(url: str) -> list[LedgerRow]:
    return [row.__class__(**{**row.__dict__, "time_s": 0.0}) for row in read_ledger(url)]


@pytest.mark.slow
def test_a_run_over_s3_is_the_run_over_a_folder(
    tmp_path: Path, settings: list[str], bucket: str
) -> None:
    source = f"{bucket}/mmdialog"
    fsspec.filesystem("s3").put(str(SOURCE), source, recursive=True)
    folder, data = tmp_path / "data", f"{bucket}/data"
    preprocess(SOURCE, folder, settings)
    preprocess(source, data, settings)
    for split in ("train", "valid", "test"):
        here, there = str(folder / split), storage.join(data, split)
        assert len(shards(here)) > 4
        assert shards(there) == shards(here)
        assert rows(there) == rows(here)
    assert run_d2i("verify", data, "--json")["problems"] == []
    before = {name: shards(storage.join(data, name)) for name in ("train", "valid", "test")}
    preprocess(source, data, settings)
    assert {name: shards(storage.join(data, name)) for name in before} == before


def test_a_store_that_is_not_there_is_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("FSSPEC_S3_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("FSSPEC_S3", json.dumps({"config_kwargs": {"retries": {"max_attempts": 0}}}))
    done = run_process(
        *("preprocess", "--corpus", "mmdialog", "--source", "s3://chats/mmdialog"),
        *("--out", tmp_path / "data", "--recipe", "demo"),
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: s3://chats/mmdialog: ")
    assert done.stderr.count("\n") == 1


def test_a_mistyped_bucket_is_refused_at_once_and_not_made(bucket: str) -> None:
    assert bucket == "s3://chats"
    done = run_process(
        *("preprocess", "--corpus", "mmdialog", "--source", SOURCE),
        *("--out", "s3://chast/data", "--recipe", "demo"),
    )
    assert done.returncode == 2
    assert done.stderr == (
        "error: s3://chast/data: there is no chast; expected a bucket that exists; make it, or "
        "mend the URL\n"
    )
    with pytest.raises(ConfigError, match="there is no chast"):
        storage.write_bytes("s3://chast/data/recipe.json", b"{}")
    assert fsspec.filesystem("s3").ls("") == ["chats"]
