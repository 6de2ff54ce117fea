"""Sana as a family: Gemma's states of an instruction and a prompt, latents of DC-AE."""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

from torch import Tensor

from d2i.diffusion.flow import FlowSchedule, shifted_schedule
from d2i.models.base import Conditions
from d2i.models.flow_transformer import FlowFamily
from d2i.models.image_codec import DC_AE_F32
from d2i.models.pipeline_family import input_dtype

_REPORT_SHIFT = 3.0


class SanaFamily(FlowFamily):
    """Sana.

    Its conditions are `text` (B, 300, D), the states of a language model, and `mask` (B, 300). The
    pipeline's own instruction precedes a prompt, in training as in sampling.
    """

    name = "sana"
    codec = DC_AE_F32
    published: ClassVar = {}
    other_parts: ClassVar = dict.fromkeys(("vae", "text_encoder", "tokenizer"))
    text_dim_setting = "caption_channels"
    num_text_tokens = 300
    published_shift = 3.0
    marks = ("caption_projection.linear_1.weight", "patch_embed.proj.weight", "scale_shift_table")

    def predict(
        self, network: Any, latent: Tensor, timestep: Tensor, conditions: Conditions
    ) -> Tensor:
        """Predict the velocity (B, C, h, w)."""
        dtype = input_dtype(network)
        predicted: Tensor = network(
            latent.to(dtype),
            encoder_hidden_states=conditions["text"].to(dtype),
            encoder_attention_mask=conditions.get("mask"),
            timestep=timestep,
            return_dict=False,
        )[0]
        return predicted

    def report_schedule(self, latent: Tensor) -> FlowSchedule:
        """Shift the levels by 3."""
        del latent
        return shifted_schedule(_REPORT_SHIFT)

    def prompt_arguments(self, conditions: Conditions, unconditional: Conditions) -> dict[str, Any]:
        """Return the pipeline's arguments for conditions (B, ...) and those of ''."""
        text, mask = conditions["text"], conditions["mask"]
        return {
            "prompt_embeds": text,
            "prompt_attention_mask": mask,
            "negative_prompt": None,
            "negative_prompt_embeds": unconditional["text"].to(text).expand_as(text),
            "negative_prompt_attention_mask": unconditional["mask"].to(mask).expand_as(mask),
        }

    def encode_prompts(self, pipeline: Any, texts: list[str], device: str) -> dict[str, Tensor]:
        """Return the states of instruction and prompt; see `PipelineFamily.encode_prompts`."""
        call = inspect.signature(type(pipeline).__call__).parameters
        text, mask, _, _ = pipeline.encode_prompt(
            prompt=list(texts),
            do_classifier_free_guidance=False,
            device=device,
            complex_human_instruction=call["complex_human_instruction"].default,
        )
        return {"text": text, "mask": mask.bool()}

    def unconditional(self, pipeline: Any, size: int, device: str) -> dict[str, Tensor]:
        """Return the states of '' without an instruction, as the pipeline guides away from it."""
        text, mask, _, _ = pipeline.encode_prompt(
            prompt=[""] * size, do_classifier_free_guidance=False, device=device
        )
        return {"text": text, "mask": mask.bool()}


FAMILY = SanaFamily()
