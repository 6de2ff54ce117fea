"""Divter: one model writes the caption of a dialog's image, another generates the image from it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from d2i.dialog import Turn
from d2i.errors import ConfigError
from d2i.eval.prompts import Prompt
from d2i.eval.system import Generation, SystemContext
from d2i.eval.systems import build_system
from d2i.eval.systems.divter_captioner import DivterCaptioner


def build(context: SystemContext) -> DivterSystem:
    """Load the caption generator and the system that generates images."""
    return DivterSystem(context)


class DivterSystem:
    """Generates a caption for each dialog, and passes it on as the whole prompt."""

    def __init__(self, context: SystemContext) -> None:
        inner = context.spec.inner
        if inner is None:
            raise ConfigError(f"{context.spec.name}: expected divter:DIR,SYSTEM")
        self._captioner = DivterCaptioner(context.spec.target, context.device)
        self._inner = build_system(dataclasses.replace(context, spec=inner))
        self.described = {"describer": self._captioner.hash, **self._inner.described}

    def generate(self, prompts: Sequence[Prompt]) -> list[Generation]:
        """Generate images from the captions of the dialogs."""
        return self._inner.generate([self._described(prompt) for prompt in prompts])

    def _described(self, prompt: Prompt) -> Prompt:
        text = self._captioner.describe(prompt.text)
        return Prompt(prompt.key, (Turn(None, text),), text)
