"""The settings and layers of Stable Diffusion 1.5. Must not import torch."""

from __future__ import annotations

from typing import Any

from d2i.backbones import Presets


def _unset(recipe: Any) -> dict[str, Any]:
    """Encode with the pipeline's own models, and generate as it does by default."""
    settings: dict[str, Any] = {
        "sample.sampler": "pipeline",
        "sample.guidance_scale": 7.5,
        "text.cut": "turn",
    }
    if base := recipe.backbone.weights:
        settings |= {"encoders.vae": f"{base}/vae", "encoders.clip_text": f"{base}/text_encoder"}
    return settings


PRESETS = Presets(
    {"sd15": {"latent_size": 64}},
    unset=_unset,
    pipeline="StableDiffusionPipeline",
    lora_targets=("to_k", "to_q", "to_v", "to_out.0"),
)
