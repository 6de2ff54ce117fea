"""The settings and layers of Stable Diffusion 1.5. Must not import torch."""

from __future__ import annotations

from functools import partial

from d2i.backbones import Presets, pipeline_settings

PRESETS = Presets(
    {"sd15": {"latent_size": 64}},
    unset=partial(pipeline_settings, guidance_scale=7.5),
    pipeline="StableDiffusionPipeline",
    lora_targets=("to_k", "to_q", "to_v", "to_out.0"),
    published_licence="CreativeML OpenRAIL-M",
)
