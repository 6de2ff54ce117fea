"""Progress of real commands: a bar on a terminal, the lines of logs elsewhere."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from d2i.demo.corpus import write_corpus
from tests.integration.commands import preprocess
from tests.processes import run_process
from tests.terminal import run_on_terminal

SMALL = ("--recipe", "demo", "--split", "test", "--workers", "0", "--json")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of seven test dialogs, one of whose images is missing."""
    path = tmp_path_factory.mktemp("corpus") / "corpus"
    write_corpus(path, 60, 1)
    next((path / "test").glob("*.jpg")).unlink()
    return path


def test_preprocess_and_verify_show_bar_on_terminal(corpus: Path, tmp_path: Path) -> None:
    command = ("preprocess", "--corpus", "mmdialog", "--source", corpus, "--out", tmp_path / "data")
    shown = run_on_terminal(*command, *SMALL, pipe_stdout=True)
    assert shown.returncode == 0, shown.terminal
    (line,) = shown.stdout.splitlines()
    (summary,) = json.loads(line)["splits"]
    assert summary["failures"] == {"missing_file": 1}
    number = summary["num_instances"]
    bar, details, end = shown.screen()[-3:]
    assert re.fullmatch(rf"━+ {number}/{number} instances  [\d.]+/s  0:00:00 left", bar)
    assert re.fullmatch(r"fetched: \d+ images, \d+/s  failed: 1 \(1 missing_file\)", details)
    assert end == ""

    checked = run_on_terminal("verify", tmp_path / "data", columns=200)
    bar, url, result, end = checked.screen()
    assert re.fullmatch(r"━+ 1/1 shards  [\d.]+/s  0:00:00 left", bar)
    assert url == f"{tmp_path}/data/test"
    assert result.endswith("samples in 1 shards, 0 problems")


def test_preprocess_prints_lines_without_terminal(corpus: Path, tmp_path: Path) -> None:
    command = ("preprocess", "--corpus", "mmdialog", "--source", corpus, "--out", tmp_path / "data")
    done = run_process(*command, *SMALL)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1
    pattern = re.compile(
        r"\d+/\d+ instances  \d+/s  (…|\d+ s) left  fetched: \d+ images, \d+/s"
        r"  failed: (none|1 missing_file)"
    )
    lines = done.stderr.splitlines()
    assert lines
    assert [line for line in lines if not pattern.fullmatch(line)] == []
    assert "\x1b" not in done.stderr


@pytest.mark.soak
def test_train_shows_bar_below_metrics_lines(corpus: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    preprocess("mmdialog", corpus, data)
    steps = ("train.num_steps=4", "train.num_log_steps=2", "train.global_batch_size=8")
    shown = run_on_terminal(
        *("train", "--recipe", "demo", "--data", data, "--run", tmp_path / "run", "--json"),
        *(word for step in (*steps, "train.micro_batch_size=8") for word in ("--set", step)),
        columns=200,
        pipe_stdout=True,
    )
    assert shown.returncode == 0, shown.terminal
    assert json.loads(shown.stdout)["step"] == 4
    lines = shown.screen()
    (bar,) = [number for number, line in enumerate(lines) if line.startswith("━")]
    assert re.fullmatch(r"━+ 4/4 steps  [\d.]+/s  0:00:00 left", lines[bar])
    assert [line.split("  ")[0] for line in lines[:bar] if line.startswith("step ")] == [
        *("step 2/4", "step 4/4", "step 4")
    ]
