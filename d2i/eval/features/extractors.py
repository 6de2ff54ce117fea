"""Feature extractors by name, for FID, KID and the Inception Score."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from d2i.config import MetricsConfig, Recipe
from d2i.encoders import Encoders
from d2i.encoders.pretrained import padded_batches
from d2i.errors import ConfigError
from d2i.eval.features.text_tower import TextTower
from d2i.eval.metrics.compute import InceptionFeatures

# CLIP's published temperature: cosine similarities times 100 are its logits.
_LOGIT_SCALE = 100.0


@dataclass(frozen=True)
class Features:
    """The output of an extractor for N images: features (N, D), and logits (N, C) or None."""

    features: NDArray[np.float32]
    logits: NDArray[np.float32] | None


class FeatureExtractor(Protocol):
    """Extracts features from images; `name` identifies it in the metric card."""

    name: str

    def extract(self, pixels: NDArray[np.uint8]) -> Features:
        """Extract features from uint8 (N, H, W, 3)."""
        ...


class ClipExtractor:
    """The recipe's CLIP image tower; its classes are prompts, as in zero-shot CLIP.

    A small, named stand-in for Inception: its FID is not comparable with any published FID.
    """

    def __init__(
        self, encoders: Encoders, tower: TextTower | None, classes: tuple[str, ...]
    ) -> None:
        if classes and tower is None:
            raise ConfigError(
                "metrics.classes needs a CLIP text tower to embed its prompts; got "
                "metrics.clip_text=null; set it to the text tower of the CLIP image encoder, or "
                "--set metrics.classes=[]"
            )
        self.name = (
            f"clip_image {encoders.clip_image.hash[:12]}, "
            f"{len(classes)} classes by zero-shot prompts"
        )
        self._encoders = encoders
        self._classes = tower.embed(classes) if tower and classes else None

    def extract(self, pixels: NDArray[np.uint8]) -> Features:
        """Return embeddings of uint8 (N, H, W, 3), and 100 times their cosine to every prompt."""
        features = self._encoders.clip_image.encode(pixels, self._encoders.compute_batch_size)
        if self._classes is None:
            return Features(features, None)
        # Row by row: the order in which BLAS sums a matrix product depends on the number of rows.
        logits = np.stack([_LOGIT_SCALE * self._classes @ row for row in _unit(features)])
        return Features(features, logits.astype(np.float32))


class InceptionExtractor:
    """torch-fidelity's Inception at one fixed, padded batch: 2048 features and 1008 logits."""

    def __init__(self, config: MetricsConfig, batch_size: int, device: str) -> None:
        self._inception = InceptionFeatures(
            config.extractor_weights, config.extractor_sha256, device
        )
        self._batch_size = batch_size
        self.name = self._inception.name

    def extract(self, pixels: NDArray[np.uint8]) -> Features:
        """Extract features and logits from uint8 (N, H, W, 3)."""
        batches = [
            [part[:count] for part in self._inception.extract(batch)]
            for batch, count in padded_batches(pixels, self._batch_size)
        ]
        features, logits = (np.concatenate(parts) for parts in zip(*batches, strict=True))
        return Features(features, logits)


def build_extractor(
    recipe: Recipe, encoders: Encoders, tower: TextTower | None, device: str
) -> FeatureExtractor:
    """Build the extractor that `metrics.extractor` names."""
    if recipe.metrics.extractor == "clip":
        return ClipExtractor(encoders, tower, recipe.metrics.classes)
    return InceptionExtractor(recipe.metrics, encoders.compute_batch_size, device)


def _unit(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    unit: NDArray[np.float32] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return unit
