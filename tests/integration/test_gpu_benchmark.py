"""The whole GPU benchmark on a CPU at toy size; its results survive a kill."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = (sys.executable, str(ROOT / "benchmarks" / "gpu.py"))
TOY = ("--device", "cpu", "--size", "toy")

pytestmark = pytest.mark.slow

# The dependencies of PyTorch, by import name.
WITH_TORCH = (
    *("torch", "torchgen", "functorch", "triton", "numpy", "typing_extensions", "sympy", "mpmath"),
    *("networkx", "jinja2", "markupsafe", "filelock", "fsspec", "setuptools"),
)
BARE_MACHINE = """
import importlib.metadata, os, sys
from importlib.machinery import PathFinder

known = {*os.environ["INSTALLED"].split(), *sys.stdlib_module_names, "d2i"}
absent = set(importlib.metadata.packages_distributions()) - known

class Bare(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if path is None and name.partition(".")[0] in absent:
            return None
        return PathFinder.find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Bare
"""


def run(out: Path, *options: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = (*PROGRAM, *TOY, "--out", str(out), *options)
    environment = {**os.environ, **env}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def read(out: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((out / "gpu.json").read_text())
    return content


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("gpu")
    done = run(directory, "--minutes", "4")
    assert done.returncode == 0, done.stderr[-3000:]
    return directory


def test_gpu_benchmark_measures_every_listed_case(out: Path) -> None:
    result = read(out)
    listed = subprocess.run((*PROGRAM, "--list"), capture_output=True, text=True, check=True)
    assert list(result["measurements"]) == listed.stdout.splitlines()
    assert result["is_finished"]
    assert result["machine"]["num_cpus"] >= 1
    states = {name: (m["state"], m["reason"]) for name, m in result["measurements"].items()}
    assert {state for state, _ in states.values()} == {"measured"}, states
    num_rows = {name: len(m["rows"]) for name, m in result["measurements"].items()}
    assert num_rows["device: matrix rate"] == 3
    # The batch size grows, except where blocks are compiled for each size.
    assert num_rows["uvit-s: training, autocast"] == 2
    assert num_rows["encoders"] == 7
    assert min(num_rows.values()) >= 1


def test_shares_are_relative_to_measured_peak_rates(out: Path) -> None:
    rows = [row for m in read(out)["measurements"].values() for row in m["rows"]]
    rates = {row["sets"]: row for row in rows if "sets" in row}
    assert set(rates) == {"bf16", "fp32", "memory", "link"}
    shares = [row for row in rows if "share" in row]
    assert len(shares) == len([row for row in rows if row["state"] == "measured"]) - len(rates)
    for row in shares:
        unit = "gb_per_s" if row["ceiling"] in ("memory", "link") else "tflop_per_s"
        assert row["share"] == pytest.approx(row[unit] / rates[row["ceiling"]][unit], rel=0.01)
        # Shares are at most 1, apart from cache effects and other load on this machine; a wrong
        # unit would be a factor of 1,000.
        assert 0 < row["share"] < 30, row
    for row in [*shares, *rates.values()]:
        assert row["ms"]["least"] <= row["ms"]["median"] <= row["ms"]["most"]
        assert row["ms"]["num"] >= 3


def test_markdown_table_is_rendered_from_json(out: Path) -> None:
    written = (out / "gpu.md").read_text()
    table = subprocess.run(
        (*PROGRAM, "--table", str(out / "gpu.json")), capture_output=True, text=True, check=True
    )
    assert table.stdout == written
    assert written.startswith("**cpu**; torch ")
    for name, measurement in read(out)["measurements"].items():
        for row in measurement["rows"]:
            lines = [
                line
                for line in written.splitlines()
                if line.startswith(f"| {name} | {row['row']}") and line.count("|") == 9
            ]
            assert len(lines) == 1, (name, row)
            if row["state"] == "measured":
                assert f"{row['ms']['median']:g} (" in lines[0]


def test_sigkill_keeps_finished_measurements(tmp_path: Path) -> None:
    command = (*PROGRAM, *TOY, "--out", str(tmp_path), "--minutes", "2")
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    while (
        not (tmp_path / "gpu.json").exists() or "median" not in (tmp_path / "gpu.json").read_text()
    ):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    # A surviving worker would keep this pipe open.
    process.communicate(timeout=60)
    result = read(tmp_path)
    states = [measurement["state"] for measurement in result["measurements"].values()]
    assert not result["is_finished"]
    assert result["measurements"]["device: matrix rate"]["rows"][0]["state"] == "measured"
    assert states[-1] == "not reached"
    assert "cut off" in (tmp_path / "gpu.md").read_text()


def test_missing_packages_skip_only_their_measurements(tmp_path: Path) -> None:
    text = (ROOT / "benchmarks" / "README.md").read_text()
    carried = re.search(r"--no-deps (pydantic .*)", text)
    assert carried is not None
    names = carried[1].replace("-", "_").replace("pillow", "PIL").split()
    (tmp_path / "sitecustomize.py").write_text(BARE_MACHINE)
    done = run(
        tmp_path,
        *("--minutes", "2", "--only", "training, fp32", "--only", "unidiffuser-v1: sampling"),
        *("--only", "encoders", "--only", "uvit-s: reading", "--only", "uvit-s: training, bf16 by"),
        PYTHONPATH=f"{tmp_path}:{ROOT}",
        INSTALLED=" ".join([*WITH_TORCH, *names]),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = read(tmp_path)["measurements"]
    assert {name: m["reason"] for name, m in found.items() if m["state"] != "measured"} == {
        "encoders": "not installed: diffusers",
        "uvit-s: reading": "not installed: msgspec",
        "uvit-s: training, bf16 by DeepSpeed": "not installed: deepspeed",
    }
    assert "unmeasured: not installed: deepspeed" in (tmp_path / "gpu.md").read_text()


def test_time_limit_is_kept(tmp_path: Path) -> None:
    done = run(tmp_path, "--minutes", "0.15")
    assert done.returncode == 0, done.stderr[-3000:]
    states = [measurement["state"] for measurement in read(tmp_path)["measurements"].values()]
    assert states[-1] == "not reached"
    assert "the time was over before it" in done.stdout


def test_missing_cuda_device_is_error_with_advice(tmp_path: Path) -> None:
    command = (*PROGRAM, "--device", "cuda", "--out", str(tmp_path))
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 2
    assert "torch sees no CUDA device; --device cpu --size toy runs on a CPU" in done.stderr
