"""However a training fails, exactly one rank reports the first error."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.failures_program import NUM_RANKS

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("ending")
    line = [sys.executable, "-m", "tests.integration.failures_program", str(out)]
    subprocess.run(line, cwd=ROOT, check=True, timeout=100)
    return out


HOST = platform.node()


@pytest.mark.parametrize(
    ("way", "ranks", "words"),
    [
        ("on_the_first", {0}, "it is wrong"),
        ("on_all", {0}, "it is wrong"),
        ("on_one", {1}, f"rank 1 on {HOST}: it is wrong"),
        ("full_disks", {1, 2}, "cannot write /disk-"),
        ("killed_one", {0, 1}, f"rank 2 on {HOST} ended, so the others cannot continue"),
        ("killed_first", {1}, f"rank 0 on {HOST} ended, so the others cannot continue"),
    ],
)
def test_failed_training_reports_first_error_in_one_line(
    reports: Path, way: str, ranks: set[int], words: str
) -> None:
    """`ranks` are those that may detect the failure first."""
    lines = {}
    for rank in range(NUM_RANKS):
        path = reports / f"{way}-{rank}.json"
        if path.exists() and (line := json.loads(path.read_text())) is not None:
            lines[rank] = line
    assert len(lines) == 1, lines
    ((rank, line),) = lines.items()
    assert rank in ranks
    assert words in line
    assert "\n" not in line
