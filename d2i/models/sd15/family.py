"""Stable Diffusion 1.5 as a family: one text encoder, CLIP-L, and no other condition."""

from typing import ClassVar

from d2i.models.stable_diffusion import StableDiffusionFamily


class SD15Family(StableDiffusionFamily):
    """Stable Diffusion 1.5, and every UNet of its pipeline that predicts noise."""

    name = "sd15"
    published: ClassVar = {"sample_size": 64, "cross_attention_dim": 768}
    other_parts: ClassVar = {
        "vae": None,
        "text_encoder": None,
        "tokenizer": None,
        "feature_extractor": None,
        "safety_checker": None,
        "requires_safety_checker": False,
    }


FAMILY = SD15Family()
