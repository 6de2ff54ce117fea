"""A run on object storage equals a local run: a real S3 server, real Ray workers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from subprocess import PIPE
from textwrap import dedent

import fsspec
import numpy as np
import pytest

from d2i.errors import ConfigError
from d2i.io import storage
from d2i.preprocess.ledger import LedgerRow, read_ledger
from tests.integration import evaluations, training
from tests.integration.logged import LOG
from tests.integration.object_store import Front, environment, object_store
from tests.processes import free_port, run_d2i, run_process
from tests.shared import SHARED, needs_shared

# Requests of a stage before the server restarts; every stage makes more.
NUM_BEFORE = 40
SOURCE = SHARED / "data" / "mmdialog"


@pytest.fixture(scope="module")
def front(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    """A server with a bucket, configured by environment variables as a user's would be."""
    directory = tmp_path_factory.mktemp("store")
    with object_store(directory / "server.log") as front, pytest.MonkeyPatch.context() as patch:
        for name, value in environment(front.port).items():
            patch.setenv(name, value)
        # fsspec read the environment when it was imported.
        patch.setitem(fsspec.config.conf, "s3", {"endpoint_url": f"http://127.0.0.1:{front.port}"})
        # The cache of fetched files belongs to this server alone.
        patch.setenv("XDG_CACHE_HOME", str(directory / "cache"))
        fsspec.filesystem("s3").mkdir("chats")
        yield front
        fsspec.filesystem("s3").clear_instance_cache()


@pytest.fixture
def bucket(front: Front) -> Iterator[str]:
    """The bucket's URL. Some requests fail, and the test restarts the server."""
    before = front.done["restarted"], front.done["refused"], front.done["unanswered"]
    yield "s3://chats"
    now = front.done["restarted"], front.done["refused"], front.done["unanswered"]
    assert all(then < after for then, after in zip(before, now, strict=True)), front.done


def preprocess(source: object, out: object, settings: list[str]) -> None:
    run_d2i(
        *("preprocess", "--corpus", "mmdialog", "--source", source, "--out", out),
        *("--recipe", "demo", "--workers", "2", *settings),
        *("--set", "preprocess.num_samples_per_shard=3"),
    )


def shards(url: str) -> dict[str, bytes]:
    """Return every file that a reader of the data needs, by name."""
    names = [name for name in storage.list_names(url) if Path(name).suffix]
    return {name: storage.read_bytes(storage.join(url, name)) for name in names}


def rows(url: str) -> list[LedgerRow]:
    return [row.__class__(**{**row.__dict__, "time_s": 0.0}) for row in read_ledger(url)]


@needs_shared
@pytest.mark.soak
def test_preprocess_on_s3_equals_local_run(
    tmp_path: Path, settings: list[str], front: Front, bucket: str
) -> None:
    source = f"{bucket}/mmdialog"
    fsspec.filesystem("s3").put(str(SOURCE), source, recursive=True)
    directory, data = tmp_path / "data", f"{bucket}/data"
    preprocess(SOURCE, directory, settings)
    vae = f"{bucket}/vae.safetensors"
    fsspec.filesystem("s3").put(str(SHARED / "weights" / "taesd_fp8.safetensors"), vae)
    settings = [*settings, "--set", f"encoders.vae={vae}"]
    front.restart_after(NUM_BEFORE)
    preprocess(source, data, settings)
    for split in ("train", "valid", "test"):
        here, there = str(directory / split), storage.join(data, split)
        assert len(shards(here)) > 4
        assert shards(there) == shards(here)
        assert rows(there) == rows(here)
    assert run_d2i("verify", data, "--json")["problems"] == []
    before = {name: shards(storage.join(data, name)) for name in ("train", "valid", "test")}
    preprocess(source, data, settings)
    assert {name: shards(storage.join(data, name)) for name in before} == before


@pytest.mark.soak
def test_killed_training_on_s3_resumes_bit_exactly(
    trained: Path, training_data: Path, front: Front, bucket: str
) -> None:
    data, run = f"{bucket}/training", f"{bucket}/run"
    fsspec.filesystem("s3").put(str(training_data), data, recursive=True)
    words = training.command(data, run, train__num_checkpoints_kept=1)
    front.restart_after(NUM_BEFORE)
    killed = run_process(*words, "--fault", "train.checkpoint_written:kill:2")
    assert killed.returncode != 0
    assert "complete.json" in names(f"{run}/checkpoints/step-2"), killed.stderr[-2000:]
    assert "complete.json" not in names(f"{run}/checkpoints/step-4")
    run_d2i(*words, "--json")
    assert storage.read_bytes(f"{run}/ema.safetensors") == training.ema_bytes(trained)
    # No line is lost or duplicated; only the newest checkpoint is kept, complete.
    metrics = [json.loads(line) for line in storage.read_bytes(f"{run}/metrics.jsonl").splitlines()]
    assert [line["step"] for line in metrics] == [3, 6]
    assert storage.list_names(f"{run}/checkpoints") == ["step-6"]
    assert storage.list_names(f"{run}/tensorboard")


@pytest.mark.soak
def test_evaluation_on_s3_equals_local_evaluation(
    chat_data: Path,
    whole: Path,
    front: Front,
    bucket: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(LOG, str(tmp_path / "drawn.txt"))
    data, out = f"{bucket}/chats", f"{bucket}/scores"
    fsspec.filesystem("s3").put(str(chat_data), data, recursive=True)
    front.restart_after(NUM_BEFORE)
    run_d2i(*evaluations.command(data, out, "--parallel", "--workers", "2", "--task-size", "2"))
    fsspec.filesystem("s3").get(out, str(tmp_path / "scores"), recursive=True)
    assert (tmp_path / "scores" / "instances.jsonl").read_bytes() == (
        whole / "instances.jsonl"
    ).read_bytes()
    assert evaluations.images_by_name(tmp_path / "scores") == evaluations.images_by_name(whole)
    ours, theirs = (
        json.loads((o / "scores.json").read_text()) for o in (tmp_path / "scores", whole)
    )
    assert ours["card"].pop("data") == f"{data}/test"
    theirs["card"].pop("data")
    assert ours == theirs


def names(url: str) -> list[str]:
    return sorted(storage.list_names(url), key=lambda name: name == "complete.json")


def test_unreachable_object_store_is_one_line_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_port()
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


@pytest.mark.usefixtures("front")
def test_number_of_s3_requests_per_file(front: Front) -> None:
    """Requests that the store rejects come on top."""
    names = [f"s3://chats/small/{number}" for number in range(60)]
    contents = [name.encode() for name in names]
    storage.write_bytes("s3://chats/small/first", b"")
    asked = [front.done["asked"]]
    for name, content in zip(names, contents, strict=True):
        storage.write_bytes(name, content)
    asked.append(front.done["asked"])
    assert read(names) == contents
    asked.append(front.done["asked"])
    writing, reading = np.diff(asked) / len(names)
    assert 1 <= writing < 1.3
    # s3fs asks for a file's size before it reads it.
    assert 2 <= reading < 2.6
    with pytest.raises(FileNotFoundError):
        read([*names, "s3://chats/small/none"])


def read(urls: list[str]) -> list[bytes]:
    return list(storage.read_each(urls))


def test_requests_wait_for_busy_or_restarting_server(
    front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the pauses of botocore's own retries, which are random: here there are none."""
    monkeypatch.setenv("FSSPEC_S3", json.dumps({"config_kwargs": {"retries": {"max_attempts": 0}}}))
    code = """
        import sys
        from d2i.io import storage
        storage.write_bytes("s3://chats/waiting/a", b"here")
        print("written", flush=True)
        sys.stdin.readline()
        print(storage.read_bytes("s3://chats/waiting/a"), storage.exists("s3://chats/waiting/b"))
        # Some of these are refused, and the answer to HEAD has no body that says why.
        print(all(storage.exists("s3://chats/waiting/a") for _ in range(50)))
    """
    command = [sys.executable, "-c", dedent(code)]
    with subprocess.Popen(command, stdin=PIPE, stdout=PIPE, text=True) as process:
        assert process.stdin and process.stdout
        assert process.stdout.readline() == "written\n"
        with front.stopped(0.5):
            process.stdin.write("\n")
            process.stdin.flush()
        assert process.stdout.read() == "b'here' False\nTrue\n"


def test_missing_bucket_is_one_line_error_and_not_created() -> None:
    done = run_process(
        *("preprocess", "--corpus", "mmdialog", "--source", SOURCE),
        *("--out", "s3://chast/data", "--recipe", "demo"),
    )
    assert done.returncode == 2
    assert done.stderr == (
        "error: s3://chast/data: no bucket chast; expected one that exists; create it, or correct "
        "the URL\n"
    )
    with pytest.raises(ConfigError, match="no bucket chast"):
        storage.write_bytes("s3://chast/data/recipe.json", b"{}")
    assert fsspec.filesystem("s3").ls("") == ["chats"]


@pytest.mark.usefixtures("front")
def test_exclusive_lock_on_s3_rejects_second_writer() -> None:
    """Also while requests are rejected or their responses lost."""
    run = "s3://chats/held"
    with (
        storage.exclusive_lock(run),
        pytest.raises(ConfigError, match=r"held: locked by another d2i process"),
        storage.exclusive_lock(run, wait_s=0),
    ):
        raise AssertionError
    assert storage.list_names(run) == []
