"""The request of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from d2i.config import Recipe
from d2i.eval.prompts import ContextMode
from d2i.eval.system import SystemSpec
from d2i.eval.worker import SaveImages


@dataclass(frozen=True)
class EvalRequest:
    """The settings of one evaluation.

    Args:
        context: The part of a dialog that the system may read.
        guidance_chosen_by: The source of the guidance scale, as in `generation_settings.Choice`.
    """

    recipe: Recipe
    system: SystemSpec
    data_url: str
    out_url: str
    context: ContextMode = "full"
    save_images: SaveImages = "sample"
    guidance_chosen_by: Mapping[str, Any] = field(default_factory=dict)
