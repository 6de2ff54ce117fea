"""Four golden AdamW steps with their averages, through DeepSpeed on two ranks, in every way."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from d2i.config import TrainConfig
from d2i.errors import ConfigError
from d2i.train.command import deepspeed_command
from d2i.train.engine import build_engine
from tests.golden.arrays import GOLDEN, facts, tensors
from tests.golden.test_losses import check_trained
from tests.integration.engine_program import BF16_STAGES, CHANGES, COMPILED, RECIPE, STAGES
from tests.shared import needs_shared

pytestmark = needs_shared
PROGRAM = Path(__file__).with_name("engine_program.py")


def run_program(num_ranks: int, out: Path) -> Path:
    launcher, *options = deepspeed_command([], num_ranks)
    ranks = options[: options.index(str(num_ranks)) + 1]
    command = [launcher, *ranks, str(PROGRAM), str(GOLDEN), str(out)]
    root = str(PROGRAM.parents[2])
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return out


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_program(2, tmp_path_factory.mktemp("engine"))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_program(1, tmp_path_factory.mktemp("alone"))


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


@pytest.mark.parametrize("way", [*STAGES, COMPILED])
def test_golden_steps_in_every_way(results: Path, way: str) -> None:
    check_golden(load_file(results / f"{way}.safetensors"))


@pytest.mark.parametrize(("first", "then"), CHANGES)
def test_golden_steps_with_a_change_of_way(results: Path, first: str, then: str) -> None:
    check_golden(load_file(results / f"{first}-to-{then}.safetensors"))


def test_compiled_blocks_go_on_to_the_bit(results: Path) -> None:
    undisturbed = load_file(results / f"{COMPILED}.safetensors")
    resumed = load_file(results / f"{COMPILED}-to-{COMPILED}.safetensors")
    assert undisturbed.keys() == resumed.keys()
    for name, tensor in undisturbed.items():
        assert torch.equal(tensor, resumed[name]), name


def check_bf16(out: Path, way: str) -> None:
    first, last, again = (
        load_file(out / f"bf16-{way}-{name}.safetensors") for name in ("0", "4", "again")
    )
    golden = load_file(GOLDEN / "uvit_tiny.safetensors")
    for kind in ("weight", "ema"):
        for name, tensor in of_kind(first, kind).items():
            assert torch.equal(tensor, golden[name]), "begun with rounded weights"
    # bfloat16 has 8 bits, and the loss is a mean over many numbers.
    expected = tensors("losses")["train4_loss"][:4].double()
    torch.testing.assert_close(last["losses"], expected, rtol=5e-3, atol=0)
    for name, tensor in last.items():
        assert torch.equal(tensor, again[name]), name


@pytest.mark.parametrize("way", BF16_STAGES)
def test_bf16_keeps_float32_weights(results: Path, way: str) -> None:
    check_bf16(results, way)


def test_one_rank_alone_does_so_too(alone: Path) -> None:
    check_bf16(alone, RECIPE)


def test_a_stage_that_cannot_be_compiled_is_refused() -> None:
    config = TrainConfig(num_steps=1, global_batch_size=1, micro_batch_size=1, compile=True)
    with pytest.raises(ConfigError, match="ZeRO stage 3"):
        build_engine(torch.nn.Linear(1, 1), config, 1, {"stage": 3})
