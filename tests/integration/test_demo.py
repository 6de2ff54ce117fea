"""The demo, whole, small: real subprocesses, real Ray, real two-rank DeepSpeed."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.processes import COMMAND, run_d2i, run_process

SMALL = ("--num-dialogs", "60", "--num-steps", "6", "--json")


def scores(out: Path) -> dict[str, Any]:
    return {
        name: json.loads((out / "eval" / name / "scores.json").read_text())["scores"]
        for name in ("before", "after")
    }


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_killed_demo_goes_on_and_ends_in_the_same_scores(tmp_path: Path) -> None:
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    command = [*COMMAND, "demo", "--out", str(killed), *SMALL]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr or ():
            if line.startswith("d2i demo: train"):
                break
        process.send_signal(signal.SIGKILL)
    result = run_d2i("demo", "--out", killed, *SMALL)
    assert set(result["seconds"]) == {
        *("corpus", "preprocess", "evaluate before", "train", "evaluate after"),
        *("judge", "report"),
    }
    assert result["attribute_accuracy_true"] > 0.98
    assert Path(result["report"]).read_text().startswith("<!")

    run_d2i("demo", "--out", whole, *SMALL)
    assert scores(whole) == scores(killed)

    other = run_process("demo", "--out", whole, "--seed", "2", *SMALL)
    assert other.returncode == 2
    assert len(other.stderr.strip().splitlines()) == 1
