"""A lease locks a directory of an object store through crashes, stalls and concurrent starts."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.local import LocalFileSystem

from d2i.errors import ConfigError
from d2i.io import lease

ROOT = Path(__file__).resolve().parents[3]
HOLD = """
import sys, time
from d2i.io import lease
from tests.unit.io.test_lease import ObjectStore
lease.RENEW_S = 0.1
with lease.hold_lease(ObjectStore(), sys.argv[1], "s3://bucket/run", 0):
    print("held", flush=True)
    time.sleep(60)
"""


class ObjectStore(LocalFileSystem):
    """A store with atomic writes and an atomic create-if-absent.

    fsspec's local file system checks and then writes, so that two concurrent creates both succeed.
    """

    protocol = "objects"

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        del kwargs
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=target.parent.parent) as whole:
            whole.write(value)
            whole.flush()
            if mode == "create":
                os.link(whole.name, target)
                return
            copy = Path(f"{whole.name}.whole")
            os.link(whole.name, copy)
            copy.replace(target)


class UnconditionalStore(LocalFileSystem):
    """A store that ignores the create-if-absent condition."""

    protocol = "forgetful"

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        del mode
        super().pipe_file(path, value, mode="overwrite", **kwargs)


class LostResponseStore(LocalFileSystem):
    """A store whose responses are lost: a write succeeds, and its retry fails."""

    protocol = "unanswering"

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        super().pipe_file(path, value, mode=mode, **kwargs)
        super().pipe_file(path, value, mode=mode, **kwargs)


@pytest.fixture(autouse=True)
def short_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "RENEW_S", 0.1)
    monkeypatch.setattr(lease, "STALE_S", 1.5)
    monkeypatch.setattr(lease, "_POLL_S", 0.02)


@pytest.fixture
def store() -> LocalFileSystem:
    return ObjectStore()


def lock_files(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / ".d2i-lock").glob("*"))


def test_lease_names_its_holder_to_a_second_command(
    tmp_path: Path, store: LocalFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A holder on this machine is known to be gone, however fresh its last renewal is.
    monkeypatch.setattr(lease, "STALE_S", math.inf)
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    with process:
        assert process.stdout and process.stdout.readline() == "held\n"
        message = (
            rf"s3://bucket/run: locked by another d2i process \(process {process.pid} on .+, since"
        )
        with (
            pytest.raises(ConfigError, match=message),
            lease.hold_lease(store, str(tmp_path), "s3://bucket/run", 0.3),
        ):
            raise AssertionError
        process.kill()
    with lease.hold_lease(store, str(tmp_path), "u", 0):
        assert lock_files(tmp_path) == ["000000002.json"]
    assert lock_files(tmp_path) == []


def test_stale_lease_is_taken_over(tmp_path: Path, store: LocalFileSystem) -> None:
    lock_dir = tmp_path / ".d2i-lock"
    lock_dir.mkdir()
    holder = {"host": "far", "machine": "far", "pid": 1, "started": "1", "token": "t"}
    (lock_dir / "000000007.json").write_text(json.dumps(holder))
    began = time.monotonic()
    with lease.hold_lease(store, str(tmp_path), "u", 0):
        assert lock_files(tmp_path) == ["000000008.json"]
    assert time.monotonic() - began >= lease.STALE_S


def test_superseded_lease_holder_exits(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout and process.stdout.readline() == "held\n"
        (tmp_path / ".d2i-lock" / "000000002.json").write_text("{}")
        _, stderr = process.communicate(timeout=30)
    assert process.returncode == 2
    assert "s3://bucket/run: another d2i process took over the lease" in stderr
    assert lock_files(tmp_path)[-1] == "000000002.json"


@pytest.mark.parametrize("is_abandoned", [False, True])
def test_lease_is_exclusive_among_concurrent_threads(
    tmp_path: Path, store: LocalFileSystem, *, is_abandoned: bool
) -> None:
    if is_abandoned:
        (tmp_path / ".d2i-lock").mkdir()
        (tmp_path / ".d2i-lock" / "000000003.json").write_text("damaged")
    num_inside, max_inside, done = [0], [0], []

    def work() -> None:
        with lease.hold_lease(store, str(tmp_path), "u", 60):
            num_inside[0] += 1
            max_inside[0] = max(max_inside[0], num_inside[0])
            time.sleep(0.02)
            num_inside[0] -= 1
            done.append(1)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(done), max_inside[0], lock_files(tmp_path)) == (8, 1, [])


def test_lease_warns_of_store_without_conditional_writes(
    tmp_path: Path, store: LocalFileSystem, caplog: pytest.LogCaptureFixture
) -> None:
    with lease.hold_lease(store, str(tmp_path), "u", 0):
        assert not caplog.records
    with lease.hold_lease(UnconditionalStore(auto_mkdir=True), str(tmp_path), "u", 0):
        assert "this store ignores If-None-Match" in caplog.text
        with pytest.raises(ConfigError), lease.hold_lease(store, str(tmp_path), "u", 0):
            raise AssertionError


def test_lease_survives_lost_response_of_store(tmp_path: Path) -> None:
    with lease.hold_lease(LostResponseStore(auto_mkdir=True), str(tmp_path), "u", 0):
        assert lock_files(tmp_path) == ["000000001.json"]
    assert lock_files(tmp_path) == []
