"""The training job of cluster/kubernetes, its script executed: preempted pods resume."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from tests.integration.training import SETTINGS, train, write_data
from tests.processes import free_port

ROOT = Path(__file__).resolve().parents[2]
NUM_STEPS = 40


def pod_script(port: int) -> str:
    """Return the script of a pod, for pods of one rank that share this machine."""
    job = list(yaml.safe_load_all((ROOT / "cluster/kubernetes/train.yaml").read_text()))[-1]
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert container["command"] == ["bash", "-ec"]
    (script,) = container["args"]
    for word, ours in {
        "--nproc-per-node 8": "--nproc-per-node 1",
        "d2i-train-0.d2i-train": "127.0.0.1",
        "29500": str(port),
        "/opt/d2i/train/launch.py": str(ROOT / "train" / "launch.py"),
        '--set backbone.weights="$WEIGHTS"': '"$@"',
    }.items():
        assert script.count(word) == 1, word
        script = script.replace(word, ours)
    return str(script)


def start_pods(data: Path, run: Path, log: Path) -> list[subprocess.Popen[bytes]]:
    script, environment = pod_script(free_port()), {"RECIPE": "demo", "RUN": run, "DATA": data}
    values = SETTINGS | {"train.num_steps": NUM_STEPS, "train.num_checkpoint_steps": 1000}
    settings = [part for name, value in values.items() for part in ("--set", f"{name}={value}")]
    with log.open("a") as out:
        return [
            subprocess.Popen(
                ["bash", "-ec", script, "pod", *settings],
                env=os.environ
                | {name: str(value) for name, value in environment.items()}
                | {"JOB_COMPLETION_INDEX": str(index)},
                stdout=out,
                stderr=out,
            )
            for index in range(2)
        ]


@pytest.mark.soak
def test_preempted_pods_resume_bit_exactly(tmp_path: Path) -> None:
    data, run, whole = write_data(tmp_path / "data"), tmp_path / "run", tmp_path / "whole"
    log = tmp_path / "log"
    first, second = start_pods(data, run, log)
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists():
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.05)
    # Kubernetes takes one node away, and signals the pod on it.
    second.send_signal(signal.SIGTERM)
    codes = [first.wait(120), second.wait(120)]
    # Kubernetes would take a pod that ends with 0 for finished, and count any other code.
    assert codes == [75, 75], log.read_text()[-3000:]
    assert (run / "stopped.json").exists()
    assert not (run / "ema.safetensors").exists()
    pods = start_pods(data, run, log)
    assert [pod.wait(120) for pod in pods] == [0, 0], log.read_text()[-3000:]
    train(data, whole, train__num_steps=NUM_STEPS, train__num_checkpoint_steps=1000)
    assert (run / "ema.safetensors").read_bytes() == (whole / "ema.safetensors").read_bytes()
