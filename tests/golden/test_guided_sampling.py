"""Whole guided sampling runs of the tiny networks equal the published ones."""

from typing import Any

import pytest
import torch
from torch import Tensor

from d2i.diffusion import dpm_solver, guided
from d2i.errors import ConfigError
from d2i.models.unidiffuser.guidance import guided_unidiffuser, join_state, split_state
from tests.golden.arrays import max_distance, tensors, tiny_unidiffuser, tiny_uvit
from tests.shared import needs_shared

pytestmark = needs_shared

FP32_TOLERANCE = 1e-3
# Bounded by the last bit of the float32 time embedding, which differs between processors.
FP64_TOLERANCE = 2e-5
LATENT_SHAPE = (4, 8, 8)


@pytest.mark.parametrize(("s", "num_steps"), [(0, 50), (1, 50), (7, 50), (1, 20)])
@torch.no_grad()
def test_guided_uvit_matches_golden(s: int, num_steps: int) -> None:
    golden, network = tensors("guided_sampling"), tiny_uvit()
    text, empty_text = golden["uvit_context"], golden["uvit_empty_context"]
    x = golden["uvit_x_T"]
    key = f"uvit_s{s}_steps{num_steps}"
    found = dpm_solver(guided(network, text, empty_text, 1 + s), x, num_steps)
    assert max_distance(found, golden[f"{key}_fp32"]) < FP32_TOLERANCE
    eps = guided(network.double(), text, empty_text, 1 + s)
    found = dpm_solver(eps, x.double(), num_steps)
    assert max_distance(found, golden[f"{key}_fp64"]) < FP64_TOLERANCE


@pytest.mark.parametrize("mode", ["none", "empty_token", "true_uncond"])
@torch.no_grad()
def test_guided_unidiffuser_matches_golden(mode: str) -> None:
    found = sample_unidiffuser(mode, torch.float32)
    check_unidiffuser(found, f"ud_{mode}", "fp32", FP32_TOLERANCE)
    found = sample_unidiffuser(mode, torch.float64)
    check_unidiffuser(found, f"ud_{mode}", "fp64", FP64_TOLERANCE)


def sample_unidiffuser(mode: Any, dtype: torch.dtype) -> Tensor:
    """The joint state after 50 steps."""
    golden, network = tensors("guided_sampling"), tiny_unidiffuser("v1").to(dtype)
    eps = guided_unidiffuser(
        network,
        golden["ud_text"],
        1 if mode == "none" else 2,
        LATENT_SHAPE,
        unconditional="true_uncond" if mode == "none" else mode,
        text_noise=lambda call: golden["ud_text_noise"][call],
        empty_text=golden["ud_empty_text"],
    )
    start = join_state(golden["ud_z_T"], golden["ud_clip_T"]).to(dtype)
    return dpm_solver(eps, start, 50)


def check_unidiffuser(state: Tensor, prefix: str, precision: str, tolerance: float) -> None:
    """Compare both parts of a joint state."""
    golden = tensors("guided_sampling")
    latent, clip_image = split_state(state, LATENT_SHAPE)
    assert max_distance(latent, golden[f"{prefix}_z_{precision}"]) < tolerance
    assert max_distance(clip_image, golden[f"{prefix}_clip_{precision}"]) < tolerance


def test_guidance_without_unconditional_input_raises() -> None:
    network, text = tiny_unidiffuser("v1"), torch.zeros(1, 7, 16)
    modes: list[Any] = ["true_uncond", "empty_token", "none"]
    for unconditional in modes:
        with pytest.raises(ConfigError, match=f"unconditional is '{unconditional}'"):
            guided_unidiffuser(network, text, 8, LATENT_SHAPE, unconditional=unconditional)
