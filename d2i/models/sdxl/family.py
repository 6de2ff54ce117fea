"""Stable Diffusion XL as a family: two text encoders, their pooled text, and the image's sizes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from d2i.diffusion.draws import BatchDraws
from d2i.models.base import Conditions
from d2i.models.stable_diffusion import StableDiffusionFamily


class SDXLFamily(StableDiffusionFamily):
    """Stable Diffusion XL.

    Its conditions are `text` (B, 77, D), `pooled` (B, P), and `time_ids` (B, 6): height and width
    of the original image, top and left of the crop, height and width of the target, in pixels.
    """

    name = "sdxl"
    published: ClassVar = {
        "sample_size": 128,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (320, 640, 1280),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    }
    other_parts: ClassVar = dict.fromkeys(
        ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    )
    has_added = True
    reads_sizes = True

    def conditions(
        self, arrays: Mapping[str, NDArray[Any]], draws: BatchDraws
    ) -> dict[str, NDArray[Any]]:
        """Return text, pooled text and sizes; the sizes are those before the square was cut."""
        del draws
        side = float(self.codec.factor * arrays["moments"].shape[-1])
        sizes = arrays["sizes"]  # (B, 2)
        known = np.where(sizes.min(axis=1, keepdims=True) > 0, sizes, side)
        scale = side / known.min(axis=1, keepdims=True)
        corner = np.round((known * scale - side) / 2)
        target = np.full_like(known, side)
        time_ids = np.concatenate([known, corner, target], axis=1).astype(np.float32)
        return {"text": arrays["text"], "pooled": arrays["pooled"], "time_ids": time_ids}

    def added(self, conditions: Conditions) -> dict[str, Tensor]:
        """Return pooled text and sizes, by diffusers' names."""
        return {"text_embeds": conditions["pooled"], "time_ids": conditions["time_ids"]}

    def prompt_arguments(
        self, conditions: Conditions, unconditional: Conditions
    ) -> dict[str, Tensor]:
        """Return the pipeline's arguments for conditions (B, ...) and those of ''."""
        pooled = conditions["pooled"]  # (B, P)
        empty = unconditional["pooled"].to(pooled).expand_as(pooled)
        return super().prompt_arguments(conditions, unconditional) | {
            "pooled_prompt_embeds": pooled,
            "negative_pooled_prompt_embeds": empty,
        }

    def example_inputs(self, network: Any) -> tuple[Any, ...]:
        """Return the UNet's arguments of one image, by position."""
        config = network.config
        num_ids = 6
        pooled_dim = (
            config.projection_class_embeddings_input_dim - num_ids * config.addition_time_embed_dim
        )
        added = {"text_embeds": torch.empty(1, pooled_dim), "time_ids": torch.ones(1, num_ids)}
        return (*super().example_inputs(network), None, None, None, None, added)


FAMILY = SDXLFamily()
