"""The settings and layers of Stable Diffusion XL. Must not import torch."""

from __future__ import annotations

from typing import Any

from d2i.backbones import Presets


def _unset(recipe: Any) -> dict[str, Any]:
    """Generate as the stock pipeline does by default."""
    del recipe
    return {"sample.sampler": "pipeline", "sample.guidance_scale": 5.0}


PRESETS = Presets(
    {"sdxl": {"latent_size": 128}},
    unset=_unset,
    pipeline="StableDiffusionXLPipeline",
    lora_targets=("to_k", "to_q", "to_v", "to_out.0"),
)
