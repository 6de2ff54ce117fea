"""One step of the trainer, whole and by LoRA, equals that of diffusers' scripts at every stage.

On two ranks, `make test` takes it with one family at each stage, `make soak` with every one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.golden.arrays import tensors
from tests.integration.backbone_program import FAMILIES, SAMPLE, WAYS
from tests.integration.training import run_on_ranks, with_breadth
from tests.shared import needs_shared

pytestmark = [needs_shared, pytest.mark.timeout(600)]
PROGRAM = Path(__file__).with_name("backbone_program.py")
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}
# Adam divides by tiny gradients.
CLOSE_AFTER: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alone")
    run_on_ranks(PROGRAM, 1, "all", out)
    return out


@pytest.fixture(scope="module")
def two_ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("ranks")
    run_on_ranks(PROGRAM, 2, "all" if with_breadth(request) else "sample", out)
    return out


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("name", FAMILIES)
def test_step_of_one_rank_equals_training_script(alone: Path, name: str, kind: str) -> None:
    found, golden = load_file(alone / f"{name}-{kind}-0.safetensors"), tensors(f"backbones/{name}")
    check_losses(found, golden, kind)
    if kind == "full":
        torch.testing.assert_close(found["grad_norm"], golden["full.grad_norm"], **CLOSE)
    else:
        check_adapter(found, golden)


@pytest.mark.parametrize(
    ("name", "kind", "stage"),
    [pytest.param(*way, marks=[] if way in SAMPLE else pytest.mark.soak) for way in WAYS],
)
def test_step_of_two_ranks_equals_training_script(
    two_ranks: Path, name: str, kind: str, stage: int
) -> None:
    found = load_file(two_ranks / f"{name}-{kind}-{stage}.safetensors")
    golden = tensors(f"backbones/{name}")
    check_losses(found, golden, kind)
    if kind == "lora":
        check_adapter(found, golden)


def check_losses(found: dict[str, Tensor], golden: dict[str, Tensor], kind: str) -> None:
    for name in ("loss_before", "loss_after"):
        torch.testing.assert_close(found[name], golden[f"{kind}.{name}"], **CLOSE)


def check_adapter(found: dict[str, Tensor], golden: dict[str, Tensor]) -> None:
    after = {
        key.removeprefix("after.").replace(".default.", "."): tensor
        for key, tensor in found.items()
        if key.startswith("after.")
    }
    stored = {
        key.removeprefix("lora.after."): tensor
        for key, tensor in golden.items()
        if key.startswith("lora.after.")
    }
    assert after.keys() == stored.keys()
    for key, tensor in stored.items():
        torch.testing.assert_close(after[key], tensor, **CLOSE_AFTER)
