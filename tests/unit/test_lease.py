"""A lease holds a folder of an object store through crashes, stalls and simultaneous starts."""

from __future__ import annotations

import json
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

from d2i import lease
from d2i.errors import ConfigError

HOLD = """
import sys, time
from fsspec.implementations.local import LocalFileSystem
from d2i import lease
lease.RENEW_S = 0.1
with lease.hold_lease(LocalFileSystem(auto_mkdir=True), sys.argv[1], "s3://bucket/run", 0):
    print("held", flush=True)
    time.sleep(60)
"""


class ObjectStore(LocalFileSystem):
    """Objects appear whole; on a condition, where there is none.

    fsspec's own looks first and writes then, so that two of a moment both do.
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
            beside = Path(f"{whole.name}.whole")
            os.link(whole.name, beside)
            beside.replace(target)


class Forgetful(LocalFileSystem):
    """A store that takes no notice of conditions."""

    protocol = "forgetful"

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        del mode
        super().pipe_file(path, value, mode="overwrite", **kwargs)


class Unanswering(LocalFileSystem):
    """A store whose answers are lost: what was asked is done, and fails when it is repeated."""

    protocol = "unanswering"

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        super().pipe_file(path, value, mode=mode, **kwargs)
        super().pipe_file(path, value, mode=mode, **kwargs)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "RENEW_S", 0.1)
    monkeypatch.setattr(lease, "STALE_S", 1.5)
    monkeypatch.setattr(lease, "_POLL_S", 0.02)


@pytest.fixture
def store() -> LocalFileSystem:
    return ObjectStore()


def held(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / ".d2i-lock").glob("*"))


def test_lease_names_its_holder_to_a_second_command(tmp_path: Path, store: LocalFileSystem) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout and process.stdout.readline() == "held\n"
        told = (
            rf"s3://bucket/run: locked by another d2i process \(process {process.pid} on .+, since"
        )
        with (
            pytest.raises(ConfigError, match=told),
            lease.hold_lease(store, str(tmp_path), "s3://bucket/run", 0.3),
        ):
            raise AssertionError
        process.kill()
    began = time.monotonic()
    with lease.hold_lease(store, str(tmp_path), "u", 0):
        assert held(tmp_path) == ["000000002.json"]
    assert time.monotonic() - began < lease.STALE_S, "a process of this machine is known to be gone"
    assert held(tmp_path) == []


def test_one_that_is_not_heard_of_is_superseded(tmp_path: Path, store: LocalFileSystem) -> None:
    folder = tmp_path / ".d2i-lock"
    folder.mkdir()
    said = {"host": "far", "machine": "far", "pid": 1, "started": "1", "token": "t"}
    (folder / "000000007.json").write_text(json.dumps(said))
    began = time.monotonic()
    with lease.hold_lease(store, str(tmp_path), "u", 0):
        assert held(tmp_path) == ["000000008.json"]
    assert time.monotonic() - began >= lease.STALE_S


def test_the_one_that_was_superseded_ends(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout and process.stdout.readline() == "held\n"
        (tmp_path / ".d2i-lock" / "000000002.json").write_text("{}")
        _, said = process.communicate(timeout=30)
    assert process.returncode == 2
    assert "s3://bucket/run: another d2i process took over the lease" in said
    assert held(tmp_path)[-1] == "000000002.json"


@pytest.mark.parametrize("is_left", [False, True])
def test_of_many_that_begin_at_one_moment_one_works(
    tmp_path: Path, store: LocalFileSystem, *, is_left: bool
) -> None:
    if is_left:
        (tmp_path / ".d2i-lock").mkdir()
        (tmp_path / ".d2i-lock" / "000000003.json").write_text("damaged")
    inside, most, done = [0], [0], []

    def work() -> None:
        with lease.hold_lease(store, str(tmp_path), "u", 60):
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            time.sleep(0.02)
            inside[0] -= 1
            done.append(1)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(done), most[0], held(tmp_path)) == (8, 1, [])


def test_a_store_that_ignores_the_condition_is_told_of(
    tmp_path: Path, store: LocalFileSystem, caplog: pytest.LogCaptureFixture
) -> None:
    with lease.hold_lease(store, str(tmp_path), "u", 0):
        assert not caplog.records
    with lease.hold_lease(Forgetful(auto_mkdir=True), str(tmp_path), "u", 0):
        assert "this store ignores If-None-Match" in caplog.text
        with pytest.raises(ConfigError), lease.hold_lease(store, str(tmp_path), "u", 0):
            raise AssertionError


def test_a_lost_answer_is_no_other_holder(tmp_path: Path) -> None:
    with lease.hold_lease(Unanswering(auto_mkdir=True), str(tmp_path), "u", 0):
        assert held(tmp_path) == ["000000001.json"]
    assert held(tmp_path) == []
