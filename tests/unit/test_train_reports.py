"""What a run shows and how it ends: pace, chart, and the lines for what went wrong."""

from __future__ import annotations

import errno
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch._inductor.exc import InductorError, InvalidCxxCompiler

from d2i.config import BackboneConfig, BackboneName, TrainConfig
from d2i.run_dir import (
    MetricsLine,
    ValidationLine,
    append_line,
    read_validation,
    truncate_logs_after,
)
from d2i.train.chart import plot_losses
from d2i.train.failures import DivergedError, check_finite, check_weights, explain_error
from d2i.train.throughput import count_flops, peak_flops, progress_line

CONFIG = TrainConfig(num_steps=10, global_batch_size=4, micro_batch_size=2)


def line(step: int, loss: float) -> MetricsLine:
    return MetricsLine(step, loss, 1e-4, 4 * step, 8.0, 1.0, 0.25, 0.4)


# docs/models.md, Work, in GFLOP; counted there by the same tool.
@pytest.mark.parametrize(
    ("name", "gigaflop"),
    [("uvit-s", 97.31), ("uvit-s-deep", 127.37), ("unidiffuser-v1", 6986.2)],
)
def test_the_work_of_an_image(name: BackboneName, gigaflop: float) -> None:
    assert count_flops(BackboneConfig(name=name)) / 1e9 == pytest.approx(gigaflop, rel=0.01)


def test_no_peak_is_made_up_for_a_processor() -> None:
    assert peak_flops(torch.device("cpu"), "bf16") is None


def test_the_progress_line_says_all() -> None:
    said = progress_line(line(4, 0.5), 10, 4)
    assert said == ("step 4/10  loss 0.5000  8 images/s  data wait 25.0%  MFU 40%  3 s left")


def test_the_chart_shows_both_losses(tmp_path: Path) -> None:
    append_line(str(tmp_path), line(1, 1.0))
    plot_losses(str(tmp_path))
    assert not (tmp_path / "loss.png").exists()
    append_line(str(tmp_path), line(5, 0.5))
    for step in (2, 5):
        append_line(str(tmp_path), ValidationLine(step, 0.7, {"1-250": 0.9}))
    plot_losses(str(tmp_path))
    pixels = np.asarray(Image.open(tmp_path / "loss.png").convert("RGB"))
    for colour in ((0x3B, 0x6F, 0xB6), (0xC8, 0x55, 0x3D)):
        assert (pixels == colour).all(-1).sum() > 100


def test_later_lines_of_a_cut_off_attempt_are_dropped(tmp_path: Path) -> None:
    for step in (2, 5):
        append_line(str(tmp_path), ValidationLine(step, 0.7, {}))
    truncate_logs_after(str(tmp_path), 4)
    assert [kept.step for kept in read_validation(str(tmp_path))] == [2]


def test_lines_go_to_weights_and_biases_on_request_alone(tmp_path: Path) -> None:
    """Kept for later where nobody is to be logged in (`WANDB_MODE=offline`); else refused here."""
    program = (
        "import sys\n"
        "from d2i.recipes import resolve_recipe\n"
        "from d2i.run_dir import MetricsLine\n"
        "from d2i.train.metrics_logger import MetricsLogger\n"
        "for settings in ([], ['train.wandb_project=chats']):\n"
        "    assert 'wandb' not in sys.modules\n"
        "    records = MetricsLogger(sys.argv[1], resolve_recipe('demo', settings), 0)\n"
        "    records.metrics(MetricsLine(3, 0.5, 1e-4, 12, 8.0, 1.0))\n"
        "    records.close()\n"
    )
    home = {"HOME": str(tmp_path / "home"), "PATH": os.environ["PATH"]}
    refused, kept = (
        subprocess.run(
            [sys.executable, "-c", program, str(tmp_path)],
            env=home | mode,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        for mode in ({}, {"WANDB_MODE": "offline"})
    )
    assert "ConfigError: train.wandb_project is chats: No API key configured." in refused.stderr
    assert kept.returncode == 0, kept.stderr
    (path,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    content = path.read_bytes()
    assert b"train/loss" in content
    assert os.uname().nodename.encode() not in content


def test_the_first_bad_step_is_named_with_its_samples() -> None:
    check_finite([0.5, 0.4], 7, {}, CONFIG)
    with pytest.raises(DivergedError) as caught:
        check_finite([0.5, math.nan, math.inf], 7, {8: [f"k{n}" for n in range(12)]}, CONFIG)
    said = str(caught.value)
    assert "the loss of step 8 is nan (samples k0, k1" in said
    assert "k8" not in said
    assert "train.optim.lr below 3e-05" in said
    assert "\n" not in said


@pytest.mark.parametrize("kind", ["weight", "exp_avg_sq", "ema"])
def test_no_checkpoint_is_made_of_what_is_no_number(kind: str) -> None:
    """The last update of a step whose loss was a number may make weights that are none."""
    runs = {"weight:a.bias:0": torch.ones(3), f"{kind}:b.weight:4": torch.ones(3)}
    check_weights(runs, 7, CONFIG)
    for value in (math.inf, -math.inf, math.nan):
        runs[f"{kind}:b.weight:4"][1] = value
        with pytest.raises(DivergedError, match=r"b\.weight is not finite after step 7, .*lr"):
            check_weights(runs, 7, CONFIG)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError(), "--set train.micro_batch_size=1 or --set train.activation_checkpointing"),
        (torch.OutOfMemoryError("CUDA out of memory"), "or --set train.zero_stage=2"),
        (OSError(errno.ENOSPC, "No space left on device", "/run/a"), "cannot write /run/a"),
        (InductorError(InvalidCxxCompiler(), None), "No working C++ compiler found"),
    ],
)
def test_what_went_wrong_is_said_with_a_way_out(
    error: Exception, words: str, tmp_path: Path
) -> None:
    meaning = explain_error(error, str(tmp_path), CONFIG)
    assert meaning is not None
    assert words in str(meaning)
    assert "rank 0 on " in str(meaning)
    assert "\n" not in str(meaning)


def test_a_bug_is_left_a_bug(tmp_path: Path) -> None:
    assert explain_error(KeyError("x"), str(tmp_path), CONFIG) is None
