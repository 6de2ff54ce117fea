"""The layers of Stable Diffusion 3. Must not import torch."""

from __future__ import annotations

from d2i.backbones import Presets

# No backbone yet: its losses are proved, and nobody has asked for more.
PRESETS = Presets(
    {},
    pipeline="StableDiffusion3Pipeline",
    network="SD3Transformer2DModel",
    network_part="transformer",
    is_flow=True,
    multiple_of=16,
    lora_targets=(
        "attn.add_k_proj",
        "attn.add_q_proj",
        "attn.add_v_proj",
        "attn.to_add_out",
        "attn.to_k",
        "attn.to_out.0",
        "attn.to_q",
        "attn.to_v",
    ),
    stores_text=False,
    published_licence="Stability AI Community",
)
