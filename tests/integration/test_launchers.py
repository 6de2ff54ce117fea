"""deepspeed, torchrun and SLURM start the ranks of two nodes: same losses, same weights."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.integration.training import command, ema_bytes, losses
from tests.processes import free_port

ROOT = Path(__file__).resolve().parents[2]
ENTRY = ROOT / "train" / "launch.py"
NUM_NODES = 2

Line = tuple[list[str], dict[str, str]]


def deepspeed_node(node: int, port: int) -> Line:
    """Return the command that the deepspeed launcher runs on each machine of its hostfile."""
    world = {f"node{number}": [0] for number in range(NUM_NODES)}
    launch = [sys.executable, "-m", "deepspeed.launcher.launch"]
    ranks = base64.urlsafe_b64encode(json.dumps(world).encode()).decode()
    master = ["--master_addr=127.0.0.1", f"--master_port={port}"]
    return [*launch, f"--world_info={ranks}", f"--node_rank={node}", *master, str(ENTRY)], {}


def torchrun_node(node: int, port: int) -> Line:
    torchrun = [str(Path(sys.executable).with_name("torchrun")), "--nnodes", str(NUM_NODES)]
    master = ["--master-addr", "127.0.0.1", "--master-port", str(port)]
    # Without `--` torchrun parses our --run as an abbreviation of its own --run-path.
    return [*torchrun, "--node-rank", str(node), *master, "--", str(ENTRY)], {}


def slurm_task(node: int, port: int) -> Line:
    """Return the variables that srun sets for each task; d2i derives the first task's node."""
    names = {
        "SLURM_JOB_ID": str(port),
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_NTASKS": str(NUM_NODES),
        "SLURM_PROCID": str(node),
        "SLURM_LOCALID": "0",
    }
    return [sys.executable, str(ENTRY)], names


@pytest.mark.parametrize(
    "node", [pytest.param(deepspeed_node, marks=pytest.mark.soak), torchrun_node, slurm_task]
)
def test_every_launcher_gives_same_losses_and_ema(
    node: Callable[[int, int], Line], training_data: Path, trained: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    start_nodes(node, entry_arguments(training_data, run))
    assert losses(run) == losses(trained)
    assert ema_bytes(run) == ema_bytes(trained)
    found = json.loads((run / "config.json").read_text())
    assert found["world_size"] == NUM_NODES


def entry_arguments(data: Path, run: Path) -> list[str]:
    """Return the arguments of `d2i train`, without `--num-accelerators`."""
    words = [str(word) for word in command(data, run)][1:]
    at = words.index("--num-accelerators")
    return words[:at] + words[at + 2 :]


def start_nodes(node: Callable[[int, int], Line], arguments: list[str]) -> None:
    port = free_port()
    with ExitStack() as stack:
        started = []
        for number in range(NUM_NODES):
            line, names = node(number, port)
            process = subprocess.Popen(
                [*line, *arguments],
                env=os.environ | names,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            stack.callback(process.kill)
            started.append(process)
        for process in started:
            _, stderr = process.communicate(timeout=120)
            assert process.returncode == 0, stderr[-3000:]
