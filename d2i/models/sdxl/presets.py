"""The settings and layers of Stable Diffusion XL. Must not import torch."""

from __future__ import annotations

from typing import Any

from d2i.backbones import Presets, pipeline_settings


def _unset(recipe: Any) -> dict[str, Any]:
    """Encode text while training: no shard holds the latents of its two text encoders."""
    on_the_fly = {"text.encode": "on_the_fly", "text.latents": "none"}
    return pipeline_settings(recipe, guidance_scale=5.0) | on_the_fly


PRESETS = Presets(
    {"sdxl": {"latent_size": 128}},
    unset=_unset,
    pipeline="StableDiffusionXLPipeline",
    lora_targets=("to_k", "to_q", "to_v", "to_out.0"),
    stores_text=False,
    published_licence="CreativeML Open RAIL++-M",
)
