"""`d2i cluster check` on two real Ray nodes with a token; one node lacks software and weights."""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.integration.conftest import write_chat
from tests.processes import COMMAND

RAY = Path(sys.executable).with_name("ray")
ADDRESSES = ("127.0.0.1", "127.0.0.2")
START_S = 60.0
HUB_NAME = "someone/clip"
SMALL_SHARDS = ("--set", "preprocess.num_samples_per_shard=2")


@contextmanager
def ray_node(environment: dict[str, str], *options: str) -> Iterator[None]:
    """Run one Ray node; kill all of its processes at the end."""
    size = ("--num-cpus=1", f"--object-store-memory={80 << 20}", "--num-gpus=0")
    process = subprocess.Popen(
        [RAY, "start", "--block", *size, *options],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for_port(port: int) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        with closing(socket.socket()) as client:
            if client.connect_ex((ADDRESSES[0], port)) == 0:
                return
        time.sleep(0.1)
    pytest.fail("no head node")


def fill_hub_cache(home: Path) -> None:
    """Write a model's configuration into the cache of the Hugging Face hub client."""
    repository = home / ".cache" / "huggingface" / "hub" / f"models--{HUB_NAME.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    (repository / "snapshots" / ("0" * 40)).mkdir(parents=True)
    (repository / "snapshots" / ("0" * 40) / "config.json").write_text("{}")
    (home / "a-file").write_text("where a folder would have to be")


def chats_in(directory: Path) -> Path:
    """Write ten chats with one image each."""
    chats = directory / "chats"
    chats.mkdir()
    (chats / "test.jsonl").write_text("\n".join(write_chat(chats, f"c{n}") for n in range(10)))
    return chats


def incomplete_environment(directory: Path, environment: dict[str, str]) -> dict[str, str]:
    """Return an environment with another diffusers version, and a home without the hub cache."""
    installed = directory / "site" / "diffusers-0.0.1.dist-info"
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: diffusers\nVersion: 0.0.1\n")
    (directory / "poor").mkdir()
    return environment | {"PYTHONPATH": str(directory / "site"), "HOME": str(directory / "poor")}


@dataclass(frozen=True)
class CheckResult:
    """The check of both nodes, a directory that they share, and the estimate of a dry run."""

    exit_code: int
    rows: list[dict[str, dict[str, str]]]
    shared: Path
    estimate: dict[str, Any]


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> CheckResult:
    directory = tmp_path_factory.mktemp("cluster")
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}
    complete = os.environ | token | {"HOME": str(directory / "rich"), "HF_HUB_OFFLINE": "1"}
    fill_hub_cache(directory / "rich")
    address, shared = f"{ADDRESSES[0]}:{port}", directory / "shared"
    # Unix socket paths are limited in length.
    with (
        tempfile.TemporaryDirectory(dir="/tmp", prefix="ray") as ray_directory,
        ExitStack() as nodes,
    ):
        head = (
            "--head",
            f"--port={port}",
            f"--temp-dir={ray_directory}",
            "--include-dashboard=false",
        )
        nodes.enter_context(ray_node(complete, *head, f"--node-ip-address={ADDRESSES[0]}"))
        wait_for_port(port)
        other = (f"--address={address}", f"--node-ip-address={ADDRESSES[1]}")
        nodes.enter_context(ray_node(incomplete_environment(directory, complete), *other))
        run = partial(subprocess.run, env=complete, capture_output=True, text=True, check=False)
        asked = ("--ray-address", address, "--json", "--recipe", "demo")
        done = run(
            [
                *(*COMMAND, "cluster", "check", *asked, "--num-nodes", "2", "--wait-s", "60"),
                *("--set", f"encoders.clip_text={HUB_NAME}"),
                *("--set", "encoders.vae=vae.safetensors"),
                *("--storage", str(shared), "--storage", "memory://apart"),
                *("--storage", str(directory / "rich" / "a-file" / "below")),
            ]
        )
        source = ("--corpus", "jsonl", "--source", str(chats_in(directory)))
        dry = ("--out", str(directory / "out"), "--dry-run", "--rate", "1", *SMALL_SHARDS)
        planned = run([*COMMAND, "preprocess", *source, *asked, *dry])
    assert planned.stdout, planned.stderr
    assert done.stdout, done.stderr
    reports = json.loads(done.stdout.splitlines()[-1])["reports"]
    rows = [{row["name"]: row for row in report["checks"]} for report in reports]
    # The incomplete node comes last.
    rows[1:] = sorted(rows[1:], key=lambda found: found["versions"]["status"] == "fail")
    estimate = json.loads(planned.stdout.splitlines()[-1])["forecast"]
    return CheckResult(done.returncode, rows, shared, estimate)


def test_passing_checks_are_ok_on_both_nodes(checked: CheckResult) -> None:
    cluster, *nodes = checked.rows
    assert cluster["nodes"]["detail"] == "2 of 2 expected"
    assert cluster["workers"]["status"] == "ok"
    assert len(nodes) == 2
    for node in nodes:
        for name in ("accelerators", "object store", "clock", f"storage {checked.shared}"):
            assert node[name]["status"] == "ok", node[name]
        assert node["weights encoders.clip_image"]["status"] == "ok"
    assert list(checked.shared.iterdir()) == [], "every probe is removed"


def test_other_version_and_missing_weights_fail_on_one_node_only(
    checked: CheckResult,
) -> None:
    _, complete, incomplete = checked.rows
    for name in ("versions", "weights encoders.clip_text"):
        assert (complete[name]["status"], incomplete[name]["status"]) == ("ok", "fail"), name
        assert incomplete[name]["fix"]
    assert "diffusers 0.0.1, the driver has" in incomplete["versions"]["detail"]
    assert "is not in the hub's cache" in incomplete["weights encoders.clip_text"]["detail"]
    assert checked.exit_code == 1


def test_weights_missing_everywhere_fail_on_each_node(checked: CheckResult) -> None:
    for node in checked.rows[1:]:
        assert node["weights encoders.vae"]["detail"] == "vae.safetensors is not on this node"


def test_storage_not_shared_between_nodes_fails(checked: CheckResult) -> None:
    # memory:// is private to a process: every node can write there but none sees the driver's file.
    for node in checked.rows[1:]:
        assert node["storage memory://apart"]["status"] == "fail"
        assert "this is other storage" in node["storage memory://apart"]["detail"]


def test_unwritable_storage_fails_on_every_node(checked: CheckResult) -> None:
    for rows in checked.rows:
        (row,) = (row for name, row in rows.items() if name.endswith("/below"))
        assert row["status"] == "fail"
        assert "cannot" in row["detail"]


def test_dry_run_estimate_uses_cluster_nodes(checked: CheckResult) -> None:
    found = checked.estimate
    assert (found["offer"]["num_nodes"], found["offer"]["unit"]) == (2, "core")
    assert found["offer"]["object_store_bytes"] == pytest.approx(2 * (80 << 20), rel=0.01)
    # Five shards of two images on two workers: three rounds.
    assert (found["num_workers"], found["num_rounds"], found["time_s"]) == (2, 3, 6.0)
