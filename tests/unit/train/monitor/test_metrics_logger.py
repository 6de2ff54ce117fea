"""Reports of a training run: throughput, loss chart, logs and error messages."""

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

from d2i.config import BackboneConfig, TrainConfig
from d2i.run_dir import (
    MetricsLine,
    ValidationLine,
    append_line,
    read_validation,
    truncate_logs_after,
)
from d2i.train.failures import DivergedError, check_finite, check_weights, explain_error
from d2i.train.monitor.chart import plot_losses
from d2i.train.monitor.throughput import count_flops, peak_flops, progress_line

CONFIG = TrainConfig(num_steps=10, global_batch_size=4, micro_batch_size=2)


def line(step: int, loss: float) -> MetricsLine:
    return MetricsLine(step, loss, 1e-4, 4 * step, 8.0, 1.0, 0.25, 0.4)


# From docs/models.md, section Work, in GFLOP; measured there with the same tool.
@pytest.mark.parametrize(
    ("name", "gigaflop"),
    [("uvit-s", 97.31), ("uvit-s-deep", 127.37), ("unidiffuser-v1", 6986.2)],
)
def test_count_flops_per_image_matches_docs(name: str, gigaflop: float) -> None:
    assert count_flops(BackboneConfig(name=name)) / 1e9 == pytest.approx(gigaflop, rel=0.01)


def test_peak_flops_of_cpu_is_none() -> None:
    assert peak_flops(torch.device("cpu"), "bf16") is None


def test_progress_line_shows_loss_throughput_and_time_left() -> None:
    text = progress_line(line(4, 0.5), 10, 4)
    assert text == ("step 4/10  loss 0.5000  8 images/s  data wait 25.0%  MFU 40%  3 s left")


def test_plot_losses_shows_training_and_validation_loss(tmp_path: Path) -> None:
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


def test_truncate_logs_after_drops_later_lines_for_resume(tmp_path: Path) -> None:
    for step in (2, 5):
        append_line(str(tmp_path), ValidationLine(step, 0.7, {}))
    truncate_logs_after(str(tmp_path), 4)
    assert [entry.step for entry in read_validation(str(tmp_path))] == [2]


def test_wandb_logging_is_opt_in_and_requires_login(tmp_path: Path) -> None:
    """`WANDB_MODE=offline` stores the log for later; without it, a missing login is an error."""
    program = (
        "import sys\n"
        "from d2i.recipes import resolve_recipe\n"
        "from d2i.run_dir import MetricsLine\n"
        "from d2i.train.monitor.metrics_logger import MetricsLogger\n"
        "for settings in ([], ['train.wandb_project=chats']):\n"
        "    assert 'wandb' not in sys.modules\n"
        "    records = MetricsLogger(sys.argv[1], resolve_recipe('demo', settings), 0)\n"
        "    records.metrics(MetricsLine(3, 0.5, 1e-4, 12, 8.0, 1.0))\n"
        "    records.close()\n"
    )
    home = {"HOME": str(tmp_path / "home"), "PATH": os.environ["PATH"]}
    rejected, offline = (
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
    assert "ConfigError: train.wandb_project is chats: No API key configured." in rejected.stderr
    assert offline.returncode == 0, offline.stderr
    (path,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    content = path.read_bytes()
    assert b"train/loss" in content
    assert os.uname().nodename.encode() not in content


def test_diverged_loss_error_names_step_and_samples() -> None:
    check_finite([0.5, 0.4], 7, {}, CONFIG)
    with pytest.raises(DivergedError) as caught:
        check_finite([0.5, math.nan, math.inf], 7, {8: [f"k{n}" for n in range(12)]}, CONFIG)
    message = str(caught.value)
    assert "the loss of step 8 is nan (samples k0, k1" in message
    assert "k8" not in message
    assert "train.optim.lr below 3e-05" in message
    assert "\n" not in message


@pytest.mark.parametrize("kind", ["weight", "exp_avg_sq", "ema"])
def test_checkpoint_of_non_finite_weights_raises(kind: str) -> None:
    """The last update may make weights non-finite although the loss of its step was finite."""
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
def test_explain_error_is_one_line_with_next_step(
    error: Exception, words: str, tmp_path: Path
) -> None:
    meaning = explain_error(error, str(tmp_path), CONFIG)
    assert meaning is not None
    assert words in str(meaning)
    assert "rank 0 on " in str(meaning)
    assert "\n" not in str(meaning)


def test_explain_error_leaves_unknown_errors(tmp_path: Path) -> None:
    assert explain_error(KeyError("x"), str(tmp_path), CONFIG) is None
