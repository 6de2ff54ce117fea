"""Z-Image as a family: texts of different lengths, a reversed time and a negated prediction."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from d2i.config import NUM_NOISE_LEVELS
from d2i.diffusion.flow import FlowSchedule, resolution_shift, shifted_schedule
from d2i.models.base import Conditions
from d2i.models.flow_transformer import FlowFamily
from d2i.models.image_codec import KL_F8C16
from d2i.models.pipeline_family import input_dtype, pad_rows

_PATCH_SIZE = 2


class ZImageFamily(FlowFamily):
    """Z-Image.

    Its conditions are `text` (B, T, D) and `mask` (B, T): the states of the language model's last
    but one layer for a chat of one user message, real tokens alone.
    """

    name = "z-image"
    codec = KL_F8C16
    published: ClassVar = {}
    other_parts: ClassVar = dict.fromkeys(("vae", "text_encoder", "tokenizer"))
    text_dim_setting = "cap_feat_dim"
    num_text_tokens = 512
    published_shift = 3.0
    has_one_length = False
    marks = ("cap_embedder.1.weight", "x_pad_token")

    def predict(
        self, network: Any, latent: Tensor, timestep: Tensor, conditions: Conditions
    ) -> Tensor:
        """Predict the velocity; the network is given 1 - sigma, and predicts its negative."""
        dtype = input_dtype(network)
        texts = _rows(conditions["text"].to(dtype), conditions.get("mask"))
        frames = list(latent.to(dtype).unsqueeze(2).unbind())  # B times (C, 1, h, w)
        time = (NUM_NOISE_LEVELS - timestep) / NUM_NOISE_LEVELS
        predicted = network(frames, time, texts, return_dict=False)[0]
        return -torch.stack(list(predicted)).squeeze(2)

    def report_schedule(self, latent: Tensor) -> FlowSchedule:
        """Shift the levels by the number of image tokens, as FLUX."""
        num_tokens = (latent.shape[-2] // _PATCH_SIZE) * (latent.shape[-1] // _PATCH_SIZE)
        return shifted_schedule(resolution_shift(num_tokens))

    def prompt_arguments(self, conditions: Conditions, unconditional: Conditions) -> dict[str, Any]:
        """Return the pipeline's arguments for conditions (B, ...) and those of ''."""
        texts = _rows(conditions["text"], conditions.get("mask"))
        shown = unconditional.get("mask")
        empty = _rows(unconditional["text"][None], None if shown is None else shown[None])
        negative = [row.to(texts[0]) for row in empty * len(texts)]
        return {"prompt_embeds": texts, "negative_prompt_embeds": negative}

    def encode_prompts(self, pipeline: Any, texts: list[str], device: str) -> dict[str, Tensor]:
        """Return the states of the last but one layer; see `PipelineFamily.encode_prompts`."""
        rows, _ = pipeline.encode_prompt(
            prompt=list(texts), device=device, do_classifier_free_guidance=False
        )
        return pad_rows(rows)


def _rows(text: Tensor, mask: Tensor | None) -> list[Tensor]:
    """Return the real tokens of each text; without a mask, all."""
    if mask is None:
        return list(text.unbind())
    return [row[shown] for row, shown in zip(text, mask.bool(), strict=True)]


FAMILY = ZImageFamily()
