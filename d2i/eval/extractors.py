"""Features of pictures for FID, KID and the Inception Score, by a named extractor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from d2i.config import Recipe
from d2i.encoders import Encoders
from d2i.eval.metrics import InceptionFeatures
from d2i.tokenize import encode, window

# CLIP's published temperature: cosine similarities times 100 are its logits.
_LOGIT_SCALE = 100.0


@dataclass(frozen=True)
class Features:
    """What an extractor reads from N pictures: features (N, D), and logits (N, C) or None."""

    features: NDArray[np.float32]
    logits: NDArray[np.float32] | None


class FeatureExtractor(Protocol):
    """Reads features from pictures; `name` says which, in the metric card."""

    name: str

    def extract(self, pixels: NDArray[np.uint8]) -> Features:
        """Read uint8 (N, H, W, 3)."""
        ...


class ClipExtractor:
    """The recipe's CLIP image tower; its classes are prompts, compared as zero-shot CLIP does.

    A small, named stand-in for Inception: its FID is comparable with no published one.
    """

    def __init__(self, encoders: Encoders, classes: tuple[str, ...]) -> None:
        self.name = (
            f"clip_image {encoders.clip_image.hash[:12]}, "
            f"{len(classes)} classes by zero-shot prompts"
        )
        self._encoders = encoders
        self._classes = self._embed(classes) if classes else None

    def extract(self, pixels: NDArray[np.uint8]) -> Features:
        """Read uint8 (N, H, W, 3): embeddings, and 100 times the cosine to every prompt."""
        features = self._encoders.clip_image.encode(pixels, self._encoders.compute_batch_size)
        if self._classes is None:
            return Features(features, None)
        logits = _LOGIT_SCALE * _unit(features) @ self._classes.T
        return Features(features, logits.astype(np.float32))

    def _embed(self, prompts: tuple[str, ...]) -> NDArray[np.float32]:
        tokens = np.stack([window(encode(prompt)) for prompt in prompts])
        return _unit(self._encoders.clip_text.embed(tokens, self._encoders.compute_batch_size))


def build_extractor(recipe: Recipe, encoders: Encoders, device: str) -> FeatureExtractor:
    """Return the extractor that the recipe's metrics name."""
    if recipe.metrics.extractor == "clip":
        return ClipExtractor(encoders, recipe.metrics.classes)
    return InceptionExtractor(recipe.metrics.extractor_weights, device)


class InceptionExtractor:
    """torch-fidelity's Inception: 2048 features and 1008 logits."""

    def __init__(self, weights: str | None, device: str) -> None:
        self._inception = InceptionFeatures(weights, device)
        self.name = self._inception.name

    def extract(self, pixels: NDArray[np.uint8]) -> Features:
        """Read uint8 (N, H, W, 3)."""
        return Features(*self._inception.extract(pixels))


def _unit(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    unit: NDArray[np.float32] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return unit
