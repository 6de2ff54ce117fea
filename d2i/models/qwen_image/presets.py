"""The layers of Qwen-Image. Must not import torch."""

from __future__ import annotations

from d2i.backbones import Presets

# No backbone yet: its losses are proved, and nobody has asked for more.
PRESETS = Presets(
    {},
    pipeline="QwenImagePipeline",
    network="QwenImageTransformer2DModel",
    network_part="transformer",
    is_flow=True,
    multiple_of=16,
    lora_targets=("to_k", "to_q", "to_v", "to_out.0"),
    stores_text=False,
    published_licence="Apache-2.0",
)
