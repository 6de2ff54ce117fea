"""The settings and layers of Z-Image. Must not import torch."""

from __future__ import annotations

from functools import partial
from typing import Any

from d2i.backbones import Presets, flow_settings


def _problem(recipe: Any) -> str | None:
    if recipe.train.compile:
        return (
            "train.compile: the texts of z-image differ in length, so its blocks would be compiled "
            "again and again; remove this setting"
        )
    return None


PRESETS = Presets(
    {"z-image": {"latent_size": 128}},
    unset=partial(flow_settings, guidance_scale=5.0, factor=8),
    problem=_problem,
    pipeline="ZImagePipeline",
    network="ZImageTransformer2DModel",
    network_part="transformer",
    is_flow=True,
    multiple_of=16,
    report="Z-Image's technical report, section 4.3: logit-normal times, shifted by resolution",
    distilled={"turbo": "Tongyi-MAI/Z-Image"},
    lora_targets=("to_k", "to_q", "to_v", "to_out.0"),
    stores_text=False,
    chat={"enable_thinking": True},
    published_licence="Apache-2.0",
)
