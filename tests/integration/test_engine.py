"""Four golden AdamW steps with EMA, through DeepSpeed on two ranks, at every ZeRO stage.

`make soak` adds more pairs of precision and stage, and of the stages before and after a resumption.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from d2i.config import TrainConfig
from d2i.diffusion.schedule import default_schedule
from d2i.errors import ConfigError
from d2i.models import build_backbone, load_weights
from d2i.train.distributed.engine import build_engine
from d2i.train.distributed.ranks import Ranks
from tests.golden.arrays import GOLDEN, facts, tensors
from tests.golden.test_losses import check_trained
from tests.integration.engine_program import (
    CHANGES,
    COMPILED,
    CONFIG,
    FROZEN,
    LOWER,
    LOWER_RUNS,
    PART_RUNS,
    RECIPE,
    SIZES,
    SOAK_CHANGES,
    SOAK_LOWER,
    SOAK_PART,
    STAGES,
    UNUSED,
    golden_batch,
    learning_rate,
)
from tests.integration.training import run_on_ranks, with_breadth
from tests.shared import needs_shared

# Two ranks build two dozen engines; each takes half a minute on a busy machine.
pytestmark = [needs_shared, pytest.mark.timeout(900)]
PROGRAM = Path(__file__).with_name("engine_program.py")


def run_program(num_ranks: int, which: str, out: Path) -> Path:
    run_on_ranks(PROGRAM, num_ranks, GOLDEN, which, out)
    return out


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    which = "all" if with_breadth(request) else "sample"
    return run_program(2, which, tmp_path_factory.mktemp("engine"))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_program(1, "all", tmp_path_factory.mktemp("alone"))


def some_soak(runs: tuple[tuple[str, str], ...], soak: set[tuple[str, str]]) -> list[Any]:
    """Return the parameters of a test, some of which only `make soak` runs."""
    return [pytest.param(*run, marks=pytest.mark.soak if run in soak else ()) for run in runs]


def tensors_of_kind(whole: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    return {k.removeprefix(f"{kind}:"): t for k, t in whole.items() if k.startswith(f"{kind}:")}


def check_golden(whole: dict[str, Tensor]) -> None:
    order = facts("losses")["param_order"]
    golden = tensors("losses")
    torch.testing.assert_close(
        whole["losses"], golden["train4_loss"][:4].double(), rtol=1e-5, atol=0
    )
    check_trained(tensors_of_kind(whole, "weight"), "train4_param", order)
    check_trained(tensors_of_kind(whole, "ema"), "train4_ema9", order)


@pytest.mark.parametrize("way", [*STAGES, COMPILED])
def test_golden_training_steps_at_every_zero_stage(results: Path, way: str) -> None:
    check_golden(load_file(results / f"{way}.safetensors"))


@pytest.mark.parametrize(("first", "then"), some_soak(CHANGES, SOAK_CHANGES))
def test_golden_training_steps_resume_at_another_zero_stage(
    results: Path, first: str, then: str
) -> None:
    check_golden(load_file(results / f"{first}-to-{then}.safetensors"))


def test_compiled_training_resumes_bit_exactly(results: Path) -> None:
    undisturbed = load_file(results / f"{COMPILED}.safetensors")
    resumed = load_file(results / f"{COMPILED}-to-{COMPILED}.safetensors")
    assert undisturbed.keys() == resumed.keys()
    for name, tensor in undisturbed.items():
        assert torch.equal(tensor, resumed[name]), name


def check_lower_precision(out: Path, precision: str, way: str) -> None:
    first, last, again = (
        load_file(out / f"{precision}-{way}-{name}.safetensors") for name in ("0", "4", "again")
    )
    golden = load_file(GOLDEN / "uvit_tiny.safetensors")
    for kind in ("weight", "ema"):
        for name, tensor in tensors_of_kind(first, kind).items():
            assert torch.equal(tensor, golden[name]), "begun with rounded weights"
    # bfloat16 has 8 bits, and the loss is a mean over many numbers.
    expected = tensors("losses")["train4_loss"][:4].double()
    torch.testing.assert_close(last["losses"], expected, rtol=5e-3, atol=0)
    for name, tensor in last.items():
        assert torch.equal(tensor, again[name]), name
    plain = plain_autocast(bias_apart=way == "zero-3")
    off = distance(tensors_of_kind(last, "weight"), plain, golden)
    # Float32 sums differ in order, and in stage 3 in DeepSpeed's own backward pass of a linear
    # layer. Sums in bfloat16 differ by more than the bound.
    most = 2e-3 if way == "zero-3" else 1e-5
    assert off < most if precision == "bf16" else off > 1e-2


def distance(found: dict[str, Tensor], expected: dict[str, Tensor], start: Any) -> float:
    """Return the distance to the expected weights, relative to how far training moved those."""
    off = sum(float((found[k] - expected[k]).square().sum()) for k in expected)
    way = sum(float((expected[k] - start[k]).square().sum()) for k in expected)
    return float((off / way) ** 0.5)


def linear_of_zero_3(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Linear layer as in DeepSpeed ZeRO-3, which adds the bias in a separate operation."""
    product = x @ weight.t()
    return product if bias is None else product.add_(bias)


@functools.cache
def plain_autocast(*, bias_apart: bool) -> dict[str, Tensor]:
    """Take four golden steps as the published program does: autocast, without DeepSpeed."""
    with pytest.MonkeyPatch.context() as patch:
        if bias_apart:
            patch.setattr(torch.nn.functional, "linear", linear_of_zero_3)
        return train_without_deepspeed()


def train_without_deepspeed() -> dict[str, Tensor]:
    torch.set_num_threads(1)
    network: Any = build_backbone("uvit-s", **SIZES, text_dim=32, num_text_tokens=7)
    load_weights(network, GOLDEN / "uvit_tiny.safetensors")
    optim = CONFIG.optim
    optimizer = torch.optim.AdamW(
        network.parameters(), betas=optim.betas, weight_decay=optim.weight_decay
    )
    alone = Ranks(rank=0, world_size=1, device=torch.device("cpu"), control=None)
    samples = [tensor.split(1) for tensor in golden_batch(GOLDEN, alone)]
    for step in range(4):
        optimizer.param_groups[0]["lr"] = learning_rate(step)
        for x0, text, n, eps in zip(*samples, strict=True):
            noised = default_schedule().add_noise(x0, eps, n)
            with torch.autocast("cpu", torch.bfloat16):
                predicted = network(noised, n, text)
            ((predicted.float() - eps).square().mean() / len(samples[0])).backward()
        assert all(weight.grad.dtype == torch.float32 for weight in network.parameters())
        optimizer.step()
        optimizer.zero_grad()
    return {name: weight.detach() for name, weight in network.named_parameters()}


@pytest.mark.parametrize(("precision", "way"), some_soak(LOWER_RUNS, SOAK_LOWER))
def test_lower_precisions_keep_float32_weights(results: Path, precision: str, way: str) -> None:
    check_lower_precision(results, precision, way)


@pytest.mark.parametrize("precision", LOWER)
def test_lower_precisions_keep_float32_weights_on_one_rank(alone: Path, precision: str) -> None:
    check_lower_precision(alone, precision, RECIPE)


def test_compile_with_zero_stage_3_raises() -> None:
    config = TrainConfig(num_steps=1, global_batch_size=1, micro_batch_size=1, compile=True)
    with pytest.raises(ConfigError, match="ZeRO stage 3"):
        build_engine(torch.nn.Linear(1, 1), config, 1, {"stage": 3})


@pytest.mark.parametrize(("precision", "way"), some_soak(PART_RUNS, SOAK_PART))
def test_only_what_requires_gradient_is_trained(results: Path, precision: str, way: str) -> None:
    golden = load_file(GOLDEN / "uvit_tiny.safetensors")
    found = load_file(results / f"part-{precision}-{way}.safetensors")
    again = load_file(results / f"part-{precision}-{way}-again.safetensors")
    weights = tensors_of_kind(found, "weight")
    frozen = {name for name in golden if name.startswith(f"{FROZEN}.")}
    assert frozen
    assert weights.keys() == (golden.keys() - frozen) | {UNUSED}
    assert not any(torch.equal(weights[name], golden[name]) for name in golden.keys() - frozen)
    # Without a gradient a parameter stays, or decays where ZeRO takes its gradient for zero.
    assert torch.all((weights[UNUSED] <= 1) & (weights[UNUSED] > 0.99))
    for name, tensor in found.items():
        assert torch.equal(tensor, again[name]), name
    if precision == "fp32":
        expected = load_file(results / "part-fp32-zero-0.safetensors")
        others = tensors_of_kind(expected, "weight")
        for name in golden.keys() - frozen:
            torch.testing.assert_close(weights[name], others[name], rtol=1e-4, atol=1e-6)
