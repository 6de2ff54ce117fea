"""The settings and layers of FLUX.2 klein. Must not import torch."""

from __future__ import annotations

from functools import partial

from d2i.backbones import Presets, flow_settings

PRESETS = Presets(
    {"flux2-klein": {"latent_size": 128}},
    unset=partial(flow_settings, guidance_scale=4.0, factor=8),
    pipeline="Flux2KleinPipeline",
    network="Flux2Transformer2DModel",
    network_part="transformer",
    is_flow=True,
    multiple_of=16,
    distilled={"distilled": "black-forest-labs/FLUX.2-klein-base-4B"},
    lora_targets=(
        "to_k",
        "to_q",
        "to_v",
        "to_out.0",
        "to_qkv_mlp_proj",
        "single_transformer_blocks.*.attn.to_out",
    ),
    stores_text=False,
    chat={"enable_thinking": False},
    published_licence="Apache-2.0 (4B); FLUX non-commercial (9B)",
)
