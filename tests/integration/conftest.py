"""What the tests of whole stages share."""

from __future__ import annotations

import pytest

from tests.integration.networks import save_random_clip
from tests.shared import SHARED


@pytest.fixture(scope="session")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The demo's recipe with a real autoencoder and a tiny U-ViT on its 8x8 latents."""
    folder = tmp_path_factory.mktemp("clip")
    save_random_clip(folder)
    values = {
        "encoders.vae": SHARED / "weights" / "taesd_fp8.safetensors",
        "encoders.vae_kind": "tiny",
        "encoders.clip_image": folder / "clip_image",
        "encoders.clip_text": folder / "clip_text",
        "metrics.clip_text": folder / "clip_text",
        "encoders.compute_batch_size": 8,
        "backbone.weights": "null",
        "backbone.latent_scale": 1.0,
        "backbone.latent_size": 8,
        "backbone.patch_size": 2,
        "backbone.dim": 32,
        "backbone.depth": 3,
        "backbone.num_heads": 2,
        "backbone.text_dim": 32,
        "train.num_steps": 3,
        "train.global_batch_size": 4,
        "train.num_checkpoint_steps": 2,
        "sample.num_steps": 3,
        "sample.compute_batch_size": 8,
    }
    return [part for name, value in values.items() for part in ("--set", f"{name}={value}")]
