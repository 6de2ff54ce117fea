"""Four golden AdamW steps with their averages, through DeepSpeed on two ranks, by every stage."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from d2i.train.command import deepspeed_command
from tests.golden.arrays import GOLDEN, facts, tensors
from tests.golden.test_losses import check_trained
from tests.integration.engine_program import CHANGES
from tests.shared import needs_shared

pytestmark = needs_shared
PROGRAM = Path(__file__).with_name("engine_program.py")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("engine")
    launcher, *options = deepspeed_command([], 2)
    ranks = options[: options.index("2") + 1]
    command = [launcher, *ranks, str(PROGRAM), str(GOLDEN), str(out)]
    root = str(PROGRAM.parents[2])
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return out


def of_kind(whole: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    return {k.removeprefix(f"{kind}:"): t for k, t in whole.items() if k.startswith(f"{kind}:")}


def check_golden(whole: dict[str, Tensor]) -> None:
    order = facts("losses")["param_order"]
    golden = tensors("losses")
    torch.testing.assert_close(
        whole["losses"], golden["train4_loss"][:4].double(), rtol=1e-5, atol=0
    )
    check_trained(of_kind(whole, "weight"), "train4_param", order)
    check_trained(of_kind(whole, "ema"), "train4_ema9", order)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_golden_steps_by_every_stage(results: Path, stage: int) -> None:
    check_golden(load_file(results / f"stage-{stage}.safetensors"))


@pytest.mark.parametrize(("first", "then"), CHANGES)
def test_golden_steps_with_a_change_of_stage(results: Path, first: int, then: int) -> None:
    check_golden(load_file(results / f"from-{first}-to-{then}.safetensors"))
