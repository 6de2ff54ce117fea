"""Divter: one model describes the picture a dialog calls for, another draws the description."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from d2i.dialog import Turn
from d2i.errors import ConfigError
from d2i.eval.divter_captioner import Describer
from d2i.eval.prompts import Prompt
from d2i.eval.system import Generation, SystemContext
from d2i.eval.systems import build_system


def build(context: SystemContext) -> DivterSystem:
    """Load the description generator and the system that draws."""
    return DivterSystem(context)


class DivterSystem:
    """Describes each dialog, and hands the description on as the whole of the prompt."""

    def __init__(self, context: SystemContext) -> None:
        inner = context.spec.inner
        if inner is None:
            raise ConfigError(f"{context.spec.name}: expected divter:DIR,SYSTEM")
        self._describer = Describer(context.spec.target, context.device)
        self._inner = build_system(dataclasses.replace(context, spec=inner))
        self.described = {"describer": self._describer.hash, **self._inner.described}

    def generate(self, prompts: Sequence[Prompt]) -> list[Generation]:
        """Draw what the dialogs are described as."""
        return self._inner.generate([self._described(prompt) for prompt in prompts])

    def _described(self, prompt: Prompt) -> Prompt:
        text = self._describer.describe(prompt.text)
        return Prompt(prompt.key, (Turn(None, text),), text)
