"""A run, or a published backbone: by d2i's own sampler, or by the pipeline that it belongs to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from d2i.backbones import presets_of
from d2i.eval.prompts import Prompt
from d2i.eval.sampler import Sampler
from d2i.eval.system import Generation, System, SystemContext, expect_line
from d2i.eval.systems.fine_tuned_pipeline import FineTunedPipeline
from d2i.models.registry import family_of_backbone
from d2i.prompt_text import text_tokens


def build(context: SystemContext) -> System:
    """Load the network of a run or of a backbone."""
    if presets_of(context.spec.backbone.name).pipeline:
        return FineTunedPipeline(context.spec, context.recipe, context.device)
    return BackboneSystem(context)


class BackboneSystem:
    """Encodes a prompt's line, truncated to the recipe's windows, and generates its image."""

    def __init__(self, context: SystemContext) -> None:
        expect_line(context)
        self._encoders, self._config = context.encoders, context.recipe.text
        backbone, vae = context.spec.backbone, context.encoders.vae
        vae.check_codec(family_of_backbone(backbone.name).codec, backbone.name)
        self._sampler = Sampler(
            backbone,
            vae,
            context.recipe.sample,
            self._encode([""])[0],
            context.device,
        )
        self.described: Mapping[str, Any] = {"backbone": self._sampler.hash}

    def generate(self, prompts: Sequence[Prompt]) -> list[Generation]:
        """Generate images; latents that are not finite are failures, not black images."""
        keys = [prompt.key for prompt in prompts]
        latents = self._sampler.sample_latents(keys, self._encode([p.text for p in prompts]))
        is_finite = latents.isfinite().flatten(1).all(dim=1)
        pixels = iter(self._sampler.decode(latents[is_finite]) if is_finite.any() else ())
        return [
            Generation(next(pixels)) if good else Generation(None, "not_finite")
            for good in is_finite.tolist()
        ]

    def _encode(self, lines: Sequence[str]) -> NDArray[Any]:
        tokens = np.stack([text_tokens(line, self._config) for line in lines])
        return self._encoders.encode_text(tokens)
