"""FLUX.2 klein as a family: three layers of a language model side by side, latents in patches."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor

from d2i.config import NUM_NOISE_LEVELS
from d2i.models.base import Conditions
from d2i.models.flow_transformer import FlowFamily
from d2i.models.image_codec import FLUX2
from d2i.models.pipeline_family import input_dtype

_NUM_AXES = 4


class _NoStatistics:
    """In place of the autoencoder: the pipeline leaves latents as the network has them.

    It would return raw ones.
    """

    bn = SimpleNamespace(running_mean=torch.zeros(1), running_var=torch.ones(1))
    config = SimpleNamespace(batch_norm_eps=0.0, block_out_channels=(0,) * 4)


class Flux2KleinFamily(FlowFamily):
    """FLUX.2 klein, and every network of its pipeline.

    Its condition is `text` (B, 512, 3 D): layers 9, 18 and 27 of a language model for a chat of one
    user message, filled up, without a mask.
    """

    name = "flux2-klein"
    codec = FLUX2
    published: ClassVar = {
        "num_layers": 5,
        "num_single_layers": 20,
        "num_attention_heads": 24,
        "joint_attention_dim": 7680,
        "guidance_embeds": False,
    }
    other_parts: ClassVar = {"vae": _NoStatistics(), "text_encoder": None, "tokenizer": None}
    text_dim_setting = "joint_attention_dim"
    num_text_tokens = 512
    marks = ("double_stream_modulation_img.linear.weight", "context_embedder.weight")

    def predict(
        self, network: Any, latent: Tensor, timestep: Tensor, conditions: Conditions
    ) -> Tensor:
        """Predict the velocity (B, 4C, h/2, w/2); every patch is a token."""
        dtype, text = input_dtype(network), conditions["text"]
        height, width = latent.shape[-2:]
        predicted: Tensor = network(
            latent.flatten(2).transpose(1, 2).to(dtype),  # (B, h/2 w/2, 4C)
            timestep=timestep / NUM_NOISE_LEVELS,
            guidance=None,
            encoder_hidden_states=text.to(dtype),
            txt_ids=_text_places(text.shape[1], text.device).expand(len(text), -1, -1),
            img_ids=_image_places(height, width, text.device).expand(len(text), -1, -1),
            return_dict=False,
        )[0]
        velocity: Tensor = predicted.transpose(1, 2).unflatten(2, (height, width))
        return velocity

    def prompt_arguments(self, conditions: Conditions, unconditional: Conditions) -> dict[str, Any]:
        """Return the pipeline's arguments for conditions (B, ...) and those of ''."""
        text = conditions["text"]  # (B, T, D)
        empty = unconditional["text"].to(text).expand_as(text)
        return {"prompt_embeds": text, "negative_prompt_embeds": empty}

    def encode_prompts(self, pipeline: Any, texts: list[str], device: str) -> dict[str, Tensor]:
        """Return three layers' states side by side; see `PipelineFamily.encode_prompts`."""
        text, _ = pipeline.encode_prompt(prompt=list(texts), device=device)
        return {"text": text}


def _text_places(num_tokens: int, device: torch.device) -> Tensor:
    """Return the places (1, T, 4) of text tokens: only the last axis counts."""
    places = torch.zeros(1, num_tokens, _NUM_AXES, dtype=torch.long, device=device)
    places[..., 3] = torch.arange(num_tokens, device=device)
    return places


def _image_places(height: int, width: int, device: torch.device) -> Tensor:
    """Return the places (1, h w, 4) of image tokens: the second axis is the row, the third column.

    Row by row.
    """
    places = torch.zeros(height, width, _NUM_AXES, dtype=torch.long, device=device)
    places[..., 1] = torch.arange(height, device=device)[:, None]
    places[..., 2] = torch.arange(width, device=device)
    return places.flatten(0, 1)[None]


FAMILY = Flux2KleinFamily()
