"""U-ViT as a family: detection, blocks and sizes; loss and sampler are those of all its kind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from d2i.models.base import Architecture, OneTensorFamily, State
from d2i.models.long_skips import LongSkipFamily
from d2i.models.positions import published_sizes
from d2i.models.uvit.model import NUM_TIME_TOKENS, UViT


class UViTFamily(LongSkipFamily, OneTensorFamily):
    """U-ViT, text to image."""

    name = "uvit"

    def build(self, backbone: str, sizes: Mapping[str, Any]) -> UViT:
        """Build a U-ViT; the presets differ in their depth alone."""
        del backbone
        return UViT(**sizes)

    def detect(self, state: State) -> Architecture | None:
        """Recognise U-ViT by its text projection."""
        if "context_embed.weight" not in state:
            return None
        sizes = published_sizes(state, text="context_embed.weight", num_others=NUM_TIME_TOKENS)
        return None if sizes is None else Architecture("uvit-s", "U-ViT, text to image", sizes)


FAMILY = UViTFamily()
