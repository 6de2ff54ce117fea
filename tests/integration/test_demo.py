"""The whole demo at a small size: real subprocesses, real Ray, real two-rank DeepSpeed."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from d2i.cli.app import app
from d2i.demo.corpus import write_corpus
from tests.command_lines import every_command, examples_in, help_page
from tests.integration.commands import preprocess
from tests.processes import COMMAND, run_d2i, run_process

SMALL = ("--num-dialogs", "60", "--num-steps", "20", "--json")


def scores(out: Path) -> dict[str, Any]:
    return {
        name: json.loads((out / "eval" / name / "scores.json").read_text())["scores"]
        for name in ("before", "after")
    }


def interrupt_at_stage(out: Path, stage: str, number: signal.Signals) -> None:
    """Start the demo and send it a signal once a stage has printed its first progress line."""
    command = [*COMMAND, "demo", "--out", str(out), *SMALL]
    with subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A shell that runs the tests in the background ignores SIGINT, and children inherit that.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    ) as process:
        lines = iter(process.stderr or ())
        assert any(line.startswith(f"d2i demo: {stage}: d2i") for line in lines)
        assert any(re.search(r"^(step )?\d+/\d+ ", line.strip()) for line in lines)
        if number == signal.SIGINT:
            # Ctrl-C in a terminal reaches every process of the group.
            os.killpg(process.pid, number)
            assert any("run the same command again to resume" in line for line in lines)
        else:
            process.send_signal(number)
    assert process.returncode != 0


# The signal that interrupts each stage: Ctrl-C or SIGKILL. `make test` has only Ctrl-C in training,
# after which half of the steps are left; `make soak` also runs an undisturbed demo, and compares.
INTERRUPTIONS = [
    ("preprocess", signal.SIGINT),
    ("evaluate before", signal.SIGKILL),
    ("train", signal.SIGINT),
    ("train", signal.SIGKILL),
    ("evaluate after", signal.SIGINT),
]


def assert_no_names_of_the_paper(page: str) -> None:
    """The report claims neither MMDialog nor U-ViT-Small (the demo has 7 blocks of width 128)."""
    assert "Systems on made world" in page
    for name in ("on MMDialog", "Table 2", "U-ViT-Small", "+ ours"):
        assert name not in page, name


def test_demo_report_does_not_use_names_of_the_paper(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus", 60, 1)
    few = ("--split", "test", "--limit", "6")
    preprocess("mmdialog", tmp_path / "corpus", tmp_path / "data", *few)
    run_d2i(
        *("eval", "--system", "uvit-s", "--weights", "demo:backbone", "--data", tmp_path / "data"),
        *("--out", tmp_path / "before", "--set", "sample.num_steps=1"),
    )
    run_d2i("report", tmp_path / "before", "--out", tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert_no_names_of_the_paper(page)
    assert '<th scope="col">demo network, not fine-tuned</th>' in page
    card = json.loads((tmp_path / "before" / "scores.json").read_text())["card"]
    assert (card["corpus"], card["split"]) == ("made world", "test")
    assert card["changed_sizes"]["depth"] == [7, 12]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    "breaks",
    [
        pytest.param(INTERRUPTIONS[2:3], id="one"),
        pytest.param(INTERRUPTIONS, id="every", marks=pytest.mark.soak),
    ],
)
def test_interrupted_demo_resumes_to_same_scores(
    tmp_path: Path, breaks: list[tuple[str, signal.Signals]]
) -> None:
    out = tmp_path / "demo"
    for stage, number in breaks:
        interrupt_at_stage(out, stage, number)
    result = run_d2i("demo", "--out", out, *SMALL)
    assert set(result["seconds"]) == {
        *("corpus", "preprocess", "evaluate before", "train", "evaluate after"),
        *("judge", "report"),
    }
    assert result["resumed"] == list(dict.fromkeys(stage for stage, _ in breaks))
    assert result["attribute_accuracy_true"] > 0.98
    page = Path(result["report"]).read_text()
    assert page.startswith("<!")
    assert_no_names_of_the_paper(page)
    assert "<title>d2i demo: demo network, made world</title>" in page

    other = run_process("demo", "--out", out, "--seed", "2", *SMALL)
    assert other.returncode == 2
    assert len(other.stderr.strip().splitlines()) == 1
    if breaks == INTERRUPTIONS:
        resumed = scores(out)
        shutil.rmtree(out)
        run_d2i("demo", "--out", out, *SMALL)
        assert scores(out) == resumed


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_examples_in_help_run_after_demo(tmp_path: Path) -> None:
    run_d2i("demo", "--out", tmp_path / "d2i-demo", "--num-dialogs", "200", *SMALL[2:])
    command = tmp_path / "bin" / "d2i"
    command.parent.mkdir()
    command.write_text(f"#!{COMMAND[0]}\n{COMMAND[2]}\n")
    command.chmod(0o755)
    path = f"{command.parent}{os.pathsep}{os.environ['PATH']}"
    pages = [help_page(command) for command in every_command(get_command(app))]
    examples = [line for page in pages for line in examples_in(page) if "d2i-demo/" in line]
    assert len(examples) > 15
    for line in examples:
        done = subprocess.run(
            ["bash", "-c", line],
            cwd=tmp_path,
            env={**os.environ, "PATH": path},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{line}: {done.stderr[-2000:]}"
