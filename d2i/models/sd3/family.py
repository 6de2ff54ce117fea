"""Stable Diffusion 3's training loss."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from d2i.models.base import Conditions
from d2i.models.flow_transformer import LossFamily
from d2i.models.image_codec import KL_F8C16
from d2i.models.pipeline_family import input_dtype


class SD3Family(LossFamily):
    """Stable Diffusion 3; its conditions are `text` (B, T, D) and `pooled` (B, P)."""

    name = "sd3"
    codec = KL_F8C16
    published: ClassVar = {}
    text_dim_setting = "joint_attention_dim"
    num_text_tokens = 333
    published_shift = 3.0

    def predict(
        self, network: Any, latent: Tensor, timestep: Tensor, conditions: Conditions
    ) -> Tensor:
        """Predict the velocity (B, C, h, w)."""
        dtype = input_dtype(network)
        predicted: Tensor = network(
            latent.to(dtype),
            timestep=timestep,
            encoder_hidden_states=conditions["text"].to(dtype),
            pooled_projections=conditions["pooled"].to(dtype),
            return_dict=False,
        )[0]
        return predicted


FAMILY = SD3Family()
