"""The published sizes of U-ViT. Must not import torch."""

from typing import Any

from d2i.backbones import Presets

_SMALL: dict[str, Any] = {
    "latent_size": 32,
    "patch_size": 2,
    "dim": 512,
    "depth": 12,
    "num_heads": 8,
    "text_dim": 768,
    "num_text_tokens": 77,
    "latent_scale": 0.23010,
    "gradient_checkpointing": False,
}
PRESETS = Presets({"uvit-s": _SMALL, "uvit-s-deep": _SMALL | {"depth": 16}})
