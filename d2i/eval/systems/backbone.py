"""A run, or a published backbone: by d2i's own sampler, or by the pipeline that it belongs to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from d2i.backbones import presets_of
from d2i.eval.prompts import Prompt
from d2i.eval.sampler import Sampler
from d2i.eval.system import (
    CallOptions,
    Generation,
    Read,
    System,
    SystemContext,
    expect_line,
)
from d2i.eval.systems.fine_tuned_pipeline import FineTunedPipeline
from d2i.models.registry import family_of_backbone
from d2i.prompt_text import text_tokens, with_omitted
from d2i.tokenize import split_at_window


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
        self._sample = context.recipe.sample
        self._sampler = Sampler(
            backbone,
            vae,
            self._sample,
            self._encode([""])[0],
            context.device,
        )
        self.described: Mapping[str, Any] = {"backbone": self._sampler.hash}

    def generate(self, prompts: Sequence[Prompt]) -> list[Generation]:
        """Generate images; latents that are not finite are failures, not black images."""
        return self.generate_seeded(prompts, CallOptions([self._sample.seed] * len(prompts)))

    def generate_seeded(self, prompts: Sequence[Prompt], options: CallOptions) -> list[Generation]:
        """Generate as `generate` does, with the options of this call."""
        latents = self._sampler.sample_latents(
            [prompt.key for prompt in prompts],
            self._encode([prompt.text for prompt in prompts]),
            options.seeds,
            options.applied(self._sample),
            options.on_step,
        )
        is_finite = latents.isfinite().flatten(1).all(dim=1)
        pixels = iter(self._sampler.decode(latents[is_finite]) if is_finite.any() else ())
        return [
            Generation(next(pixels)) if good else Generation(None, "not_finite")
            for good in is_finite.tolist()
        ]

    def read(self, prompt: Prompt) -> Read:
        """Return the line as CLIP's tokenizer cleans it and the window cuts it."""
        text, cut, tokens = split_at_window(
            prompt.text, keep=self._config.keep, num_windows=self._config.num_windows
        )
        return Read(text, tokens, with_omitted(cut, prompt.turns, self._config))

    def _encode(self, lines: Sequence[str]) -> NDArray[Any]:
        tokens = np.stack([text_tokens(line, self._config) for line in lines])
        return self._encoders.encode_text(tokens)
