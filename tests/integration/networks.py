"""Small random networks in the real formats, made by the tests that need them."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

_SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}


def save_random_clip(folder: Path) -> None:
    """Write `clip_text` (the true vocabulary) and `clip_image`, by `save_pretrained`."""
    torch.manual_seed(0)
    text = CLIPTextConfig(num_hidden_layers=1, projection_dim=32, **_SIZES)
    image = CLIPVisionConfig(
        num_hidden_layers=1, projection_dim=32, image_size=32, patch_size=8, **_SIZES
    )
    CLIPTextModelWithProjection(text).save_pretrained(folder / "clip_text")
    CLIPVisionModelWithProjection(image).save_pretrained(folder / "clip_image")
