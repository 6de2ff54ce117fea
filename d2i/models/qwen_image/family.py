"""Qwen-Image's training loss."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from d2i.config import NUM_NOISE_LEVELS
from d2i.models.base import Conditions
from d2i.models.flow_transformer import LossFamily
from d2i.models.image_codec import QWEN_IMAGE
from d2i.models.pipeline_family import input_dtype

_PATCH_SIZE = 2


class QwenImageFamily(LossFamily):
    """Qwen-Image; its conditions are `text` (B, T, D) and `mask` (B, T)."""

    name = "qwen-image"
    codec = QWEN_IMAGE
    published: ClassVar = {}
    text_dim_setting = "joint_attention_dim"
    num_text_tokens = 1024
    has_one_length = False

    def predict(
        self, network: Any, latent: Tensor, timestep: Tensor, conditions: Conditions
    ) -> Tensor:
        """Predict the velocity (B, C, h, w); 2 x 2 pixels of a latent are a token."""
        dtype = input_dtype(network)
        patches = pixel_unshuffle(latent, _PATCH_SIZE)  # (B, 4C, h/2, w/2)
        height, width = patches.shape[-2:]
        predicted: Tensor = network(
            hidden_states=patches.flatten(2).transpose(1, 2).to(dtype),  # (B, h/2 w/2, 4C)
            timestep=timestep / NUM_NOISE_LEVELS,
            encoder_hidden_states=conditions["text"].to(dtype),
            encoder_hidden_states_mask=conditions.get("mask"),
            img_shapes=[[(1, height, width)]] * len(latent),
            return_dict=False,
        )[0]
        return pixel_shuffle(predicted.transpose(1, 2).unflatten(2, (height, width)), _PATCH_SIZE)


FAMILY = QwenImageFamily()
