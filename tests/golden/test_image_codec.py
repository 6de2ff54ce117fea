"""Normalised latents of each codec, as the published training scripts make them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from d2i.models.image_codec import DC_AE_F32, FLUX2, KL_F8C4, KL_F8C16, ImageCodec
from tests.golden.arrays import facts, tensors
from tests.shared import needs_shared

CODECS: dict[str, ImageCodec] = {
    "sd15": KL_F8C4,
    "sdxl": KL_F8C4,
    "sd3": KL_F8C16,
    "flux1": KL_F8C16,
    "z_image": KL_F8C16,
    "flux2_klein": FLUX2,
    "sana": DC_AE_F32,
}
FLOW = [family for family in CODECS if not family.startswith("sd1") and family != "sdxl"]


@needs_shared
@pytest.mark.parametrize("family", FLOW)
def test_normalised_latents_are_those_of_training_script(family: str) -> None:
    """The noised latent is (1 - sigma) x0 + sigma noise."""
    golden, vae = tensors(f"backbones/{family}"), facts(f"backbones/{family}")["vae_numbers"]
    latent = CODECS[family].normalised(golden["in.raw"], vae)
    # FLUX.2's noise is drawn in the form of the normalised latent.
    noise = golden["in.noise"].reshape(latent.shape)
    sigma = golden["out.sigmas"].view(-1, 1, 1, 1)
    noisy = (1 - sigma) * latent + sigma * noise
    torch.testing.assert_close(noisy, golden["out.noisy"], rtol=1e-4, atol=1e-5)


@needs_shared
@pytest.mark.parametrize("family", CODECS)
def test_denormalised_latents_are_the_raw_ones(family: str) -> None:
    raw, vae = tensors(f"backbones/{family}")["in.raw"], facts(f"backbones/{family}")["vae_numbers"]
    codec = CODECS[family]
    found = codec.denormalised(codec.normalised(raw, vae), vae)
    torch.testing.assert_close(found, raw, rtol=1e-5, atol=1e-6)


def test_patches_have_the_order_of_stock_pipeline() -> None:
    from diffusers import Flux2KleinPipeline

    patchify: Any = Flux2KleinPipeline._patchify_latents
    raw = torch.randn(2, 32, 4, 6)
    same = {"bn_running_mean": [0.0] * 128, "bn_running_var": [1.0] * 128, "batch_norm_eps": 0.0}
    assert FLUX2.normalised(raw, same).equal(patchify(raw))
    assert FLUX2.denormalised(patchify(raw), same).equal(raw)
