"""The text tower in the embedding space of the CLIP image encoder, for CLIP-T and retrieval."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from d2i.config import Recipe
from d2i.encoders import ClipText, Encoders
from d2i.errors import ConfigError
from d2i.tokenize import encode, window


class TextTower:
    """Embeds lines in the space of the CLIP image encoder.

    A line is truncated to one token window; `text.keep` decides which end stays.
    """

    def __init__(self, tower: ClipText, recipe: Recipe) -> None:
        self._tower, self._keep = tower, recipe.text.keep
        self._batch_size = recipe.encoders.compute_batch_size
        self.hash = tower.hash

    @classmethod
    def load(cls, recipe: Recipe, encoders: Encoders, device: str) -> TextTower | None:
        """Load `metrics.clip_text`, or return None if it is null.

        Raises:
            ConfigError: If its embedding width differs from the image encoder's.
            CheckpointError: If it cannot be loaded.
        """
        name = recipe.metrics.clip_text
        if name is None:
            return None
        # Share one copy where the network is conditioned on the same tower.
        is_shared = name == recipe.encoders.clip_text and recipe.encoders.text_prefix is None
        shared = encoders.clip_text if is_shared else None
        tower = shared or ClipText(name, None, device)
        widths = [t.module.config.projection_dim for t in (tower, encoders.clip_image)]
        if widths[0] != widths[1]:
            raise ConfigError(
                f"metrics.clip_text {name}: got embeddings of width {widths[0]}, expected "
                f"{widths[1]} as of the CLIP image encoder; --set metrics.clip_text=PATH to the "
                "text tower of the same CLIP, or metrics.clip_text=null for none"
            )
        return cls(tower, recipe)

    def embed(self, lines: Sequence[str]) -> NDArray[np.float32]:
        """Embed N lines as float32 (N, clip_dim), each of length 1."""
        tokens = np.stack([window(encode(line), keep=self._keep) for line in lines])
        rows = self._tower.embed(tokens, self._batch_size)
        unit: NDArray[np.float32] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        return unit
