"""SIGKILL of a rank, the launcher or the command at random steps: training resumes bit-exactly."""

from __future__ import annotations

import os
import platform
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.training import command, ema_bytes, keys_by_step, train, write_data
from tests.processes import COMMAND, command_lines

NUM_STEPS = 60
CHANGED = {
    "train__num_steps": NUM_STEPS,
    "train__num_checkpoint_steps": 7,
    "train__num_log_steps": 5,
    "train__record_keys": "true",
    "train__num_validation_steps": 20,
}
# A part of each victim's command line, which also contains the run's directory.
VICTIMS = {
    "rank 0": "--local_rank=0",
    "rank 1": "--local_rank=1",
    "launcher": "deepspeed.launcher.launch",
    "command": "from d2i.cli import main",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "undisturbed"
    train(data, run, **CHANGED)
    return run


def kill(victim: str, run: Path) -> None:
    """SIGKILL the processes whose command line names the victim and the run."""
    for number, words in command_lines():
        is_rank = "--local_rank" in words
        if is_rank == victim.startswith("rank") and VICTIMS[victim] in words and str(run) in words:
            os.kill(number, signal.SIGKILL)


def kill_at(data: Path, run: Path, victim: str, step: int) -> None:
    """Start the command and kill the victim once the first rank has reached a step."""
    words = [*COMMAND, *map(str, command(data, run, **CHANGED))]
    log = run / "keys" / "rank-0.jsonl"
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
        wait_until(lambda: log.exists() and log.read_text().count("\n") >= 2 * step, process)
        kill(victim, run)
        _, stderr = process.communicate(timeout=120)
    assert process.returncode != 0, stderr
    if victim.startswith("rank"):
        assert stderr.count(f"{victim} on {platform.node()} ended") == 1


def wait_until(is_so: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    while not is_so():
        assert process.poll() is None, "it ended before it was to be killed"
        time.sleep(0.002)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(1, 21))
def test_training_killed_at_random_step_resumes_bit_exactly(
    data: Path, undisturbed: Path, tmp_path: Path, seed: int
) -> None:
    rng = random.Random(seed)
    run, victim = tmp_path / "run", rng.choice(sorted(VICTIMS))
    kill_at(data, run, victim, rng.randint(1, NUM_STEPS // 2))
    train(data, run, **CHANGED)
    assert ema_bytes(run) == ema_bytes(undisturbed), victim
    assert keys_by_step(run).keys() == keys_by_step(undisturbed).keys()
