"""The settings and layers of Stable Diffusion XL. Must not import torch."""

from __future__ import annotations

from typing import Any

from d2i.backbones import Presets


def _unset(recipe: Any) -> dict[str, Any]:
    """Encode with the pipeline's own models, and generate as it does by default.

    No shard holds the latents of its two text encoders.
    """
    settings: dict[str, Any] = {
        "sample.sampler": "pipeline",
        "sample.guidance_scale": 5.0,
        "text.cut": "turn",
        "text.encode": "on_the_fly",
        "text.latents": "none",
    }
    if base := recipe.backbone.weights:
        settings |= {"encoders.vae": f"{base}/vae", "encoders.clip_text": f"{base}/text_encoder"}
    return settings


PRESETS = Presets(
    {"sdxl": {"latent_size": 128}},
    unset=_unset,
    pipeline="StableDiffusionXLPipeline",
    lora_targets=("to_k", "to_q", "to_v", "to_out.0"),
    stores_text=False,
)
