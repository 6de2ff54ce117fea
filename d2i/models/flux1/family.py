"""FLUX.1's training loss."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from d2i.config import NUM_NOISE_LEVELS
from d2i.models.base import Conditions
from d2i.models.flow_transformer import LossFamily
from d2i.models.image_codec import KL_F8C16
from d2i.models.pipeline_family import input_dtype

_PATCH_SIZE = 2
_NUM_AXES = 3


class Flux1Family(LossFamily):
    """FLUX.1; its conditions are `text` (B, T, D) and `pooled` (B, P)."""

    name = "flux1"
    codec = KL_F8C16
    published: ClassVar = {"guidance_embeds": True}
    text_dim_setting = "joint_attention_dim"
    num_text_tokens = 512
    guidance: ClassVar[float] = 3.5
    """The guidance that the network is given, as the published script trains with."""

    def predict(
        self, network: Any, latent: Tensor, timestep: Tensor, conditions: Conditions
    ) -> Tensor:
        """Predict the velocity (B, C, h, w); 2 x 2 pixels of a latent are a token."""
        dtype, text = input_dtype(network), conditions["text"]
        patches = pixel_unshuffle(latent, _PATCH_SIZE)  # (B, 4C, h/2, w/2)
        height, width = patches.shape[-2:]
        has_guidance = getattr(network, "module", network).config.guidance_embeds
        places = torch.zeros(height, width, _NUM_AXES, device=text.device)
        places[..., 1] = torch.arange(height, device=text.device)[:, None]
        places[..., 2] = torch.arange(width, device=text.device)
        predicted: Tensor = network(
            patches.flatten(2).transpose(1, 2).to(dtype),  # (B, h/2 w/2, 4C)
            timestep=timestep / NUM_NOISE_LEVELS,
            guidance=torch.full_like(timestep, self.guidance) if has_guidance else None,
            pooled_projections=conditions["pooled"].to(dtype),
            encoder_hidden_states=text.to(dtype),
            txt_ids=torch.zeros(text.shape[1], _NUM_AXES, device=text.device),
            img_ids=places.flatten(0, 1),
            return_dict=False,
        )[0]
        return pixel_shuffle(predicted.transpose(1, 2).unflatten(2, (height, width)), _PATCH_SIZE)


FAMILY = Flux1Family()
