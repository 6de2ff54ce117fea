"""The SLURM batch scripts, executed: a preempted job is requeued and resumes."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.training import SETTINGS, train, write_data
from tests.processes import run_d2i
from tests.shared import SHARED, needs_shared
from tests.slurm import ROOT, Slurm, end_all

SCRIPTS = ROOT / "cluster" / "slurm"
DEADLINE_S = 120.0


def wait_until(is_so: Callable[[], bool], log: Path) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not is_so():
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.05)


def contents(directory: Path) -> dict[str, bytes]:
    paths = [path for path in directory.glob("*/*") if path.is_file() and path.name[0] != "."]
    return {f"{path.parent.name}/{path.name}": path.read_bytes() for path in paths}


@needs_shared
@pytest.mark.soak
def test_preprocess_job_out_of_time_is_requeued_and_resumes(tmp_path: Path) -> None:
    slurm = Slurm(tmp_path, num_nodes=2, num_tasks=2)
    log = tmp_path / "log"
    out, whole = tmp_path / "out", tmp_path / "whole"
    line = [
        *("preprocess", "--corpus", "mmdialog", "--source", SHARED / "data" / "mmdialog"),
        *("--recipe", "demo", "--set", "preprocess.num_samples_per_shard=3"),
    ]
    fault = ("--fault", "job.shard_done:sleep:1")
    job = slurm.start(SCRIPTS / "ray.sbatch", *line, "--out", out, *fault, log=log)
    try:
        wait_until(lambda: any(out.glob("*/*.commit.json")), log)
        # SLURM sends it a minute before the end, to the script alone.
        os.kill(job.pid, signal.SIGUSR1)
        assert job.wait(DEADLINE_S) == 1
        assert slurm.num_requeued == 1
    finally:
        end_all(job)
    job = slurm.start(SCRIPTS / "ray.sbatch", *line, "--out", out, log=log)
    try:
        assert job.wait(DEADLINE_S) == 0, log.read_text()[-3000:]
    finally:
        end_all(job)
    assert "ok    nodes: 2 of 2 expected" in log.read_text()
    run_d2i(*line, "--out", whole, "--workers", "0")
    assert len(contents(whole)) > 12
    assert contents(out) == contents(whole)


@pytest.mark.soak
def test_preempted_training_job_is_requeued_and_resumes_bit_exactly(
    tmp_path: Path,
) -> None:
    data, run, whole = write_data(tmp_path / "data"), tmp_path / "run", tmp_path / "whole"
    changed = {"train.num_steps": 40, "train.num_checkpoint_steps": 1000}
    settings = [f"{name}={value}" for name, value in (SETTINGS | changed).items()]
    line = [run, "--recipe", "demo", "--data", data]
    line += [word for setting in settings for word in ("--set", setting)]
    slurm = Slurm(tmp_path, num_nodes=1, num_tasks=2)
    log = tmp_path / "log"
    job = slurm.start(SCRIPTS / "train.sbatch", *line, log=log)
    try:
        wait_until((run / "metrics.jsonl").exists, log)
        # SLURM sends it two minutes before the end, to the ranks; here srun forwards it.
        os.kill(step_of(job.pid), signal.SIGUSR1)
        assert job.wait(DEADLINE_S) == 0, log.read_text()[-3000:]
    finally:
        end_all(job)
    assert slurm.num_requeued == 1
    assert not (run / "ema.safetensors").exists()
    job = slurm.start(SCRIPTS / "train.sbatch", *line, log=log)
    try:
        assert job.wait(DEADLINE_S) == 0, log.read_text()[-3000:]
    finally:
        end_all(job)
    assert slurm.num_requeued == 1, "a finished run asks for no further life"
    train(data, whole, train__num_steps=40, train__num_checkpoint_steps=1000)
    assert (run / "ema.safetensors").read_bytes() == (whole / "ema.safetensors").read_bytes()


def step_of(script: int) -> int:
    """Return the pid of the `srun` that a batch script waits for."""
    children = Path(f"/proc/{script}/task/{script}/children").read_text().split()
    (step,) = map(int, children)
    return step
