"""The layers of FLUX.1. Must not import torch."""

from __future__ import annotations

from d2i.backbones import Presets

# No backbone yet: its losses are proved, and nobody has asked for more.
PRESETS = Presets(
    {},
    pipeline="FluxPipeline",
    network="FluxTransformer2DModel",
    network_part="transformer",
    is_flow=True,
    multiple_of=16,
    lora_targets=(
        "attn.to_k",
        "attn.to_q",
        "attn.to_v",
        "attn.to_out.0",
        "attn.add_k_proj",
        "attn.add_q_proj",
        "attn.add_v_proj",
        "attn.to_add_out",
        "ff.net.0.proj",
        "ff.net.2",
        "ff_context.net.0.proj",
        "ff_context.net.2",
    ),
    stores_text=False,
    published_licence="FLUX non-commercial (dev); Apache-2.0 (schnell)",
)
