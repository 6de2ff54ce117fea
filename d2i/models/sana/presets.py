"""The settings and layers of Sana. Must not import torch."""

from __future__ import annotations

from typing import Any

from d2i.backbones import Presets, flow_settings


def _unset(recipe: Any) -> dict[str, Any]:
    return flow_settings(recipe, guidance_scale=4.5, factor=32) | {"sample.num_steps": 20}


PRESETS = Presets(
    {"sana": {"latent_size": 32}},
    unset=_unset,
    pipeline="SanaPipeline",
    network="SanaTransformer2DModel",
    network_part="transformer",
    is_flow=True,
    multiple_of=32,
    call_options={"use_resolution_binning": False},
    report="Sana's published configuration (Sana_1600M_img1024): logit-normal times, shift 3",
    distilled={"sprint": "Efficient-Large-Model/Sana_1600M_1024px_diffusers"},
    lora_targets=("to_k", "to_q", "to_v"),
    stores_text=False,
    published_licence="Apache-2.0; its text encoder, Gemma 2, is under the Gemma terms",
)
