"""From pictures to the numbers that scores are computed from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from d2i.config import Recipe
from d2i.encoders import Encoders
from d2i.encoders.bundle import versions
from d2i.errors import DataError
from d2i.eval.extractors import build_extractor
from d2i.eval.reference_features import ReferenceFeatures
from d2i.eval.system import Generation
from d2i.eval.text import TextTower
from d2i.image_decode import crop_to_square, decode_image
from d2i.shards import ShardReader

Arrays = dict[str, NDArray[Any]]


class FeatureComputer:
    """The feature extractor, CLIP's two towers, and the pictures that were really sent.

    All of them run at one fixed, padded batch.

    Args:
        recipe: Its image, encoders and metrics decide.
        encoders: The recipe's encoders.
        reader: The data set.
        device: Where the extractor runs.
    """

    def __init__(
        self, recipe: Recipe, encoders: Encoders, reader: ShardReader, device: str
    ) -> None:
        self._recipe, self._encoders, self._reader = recipe, encoders, reader
        self._tower = TextTower.load(recipe, encoders, device)
        self._extractor = build_extractor(recipe, encoders, self._tower, device)
        self.resolution = recipe.metrics.resolution or recipe.image.resolution
        self._real = ReferenceFeatures(self.describe_real(device))

    def describe(self) -> dict[str, Any]:
        """Return what decides the numbers, for the metric card."""
        return {
            "extractor": self._extractor.name,
            "clip_text": self._tower.hash if self._tower else None,
        }

    def describe_real(self, device: str) -> dict[str, Any]:
        """Return what decides the features of the true pictures."""
        return {
            "manifest_sha256": self._reader.manifest.sha256,
            "extractor": self._extractor.name,
            "clip_image": self._encoders.clip_image.hash,
            "image": self._recipe.image.model_dump(mode="json"),
            "resolution": self.resolution,
            "compute_batch_size": self._encoders.compute_batch_size,
            "device": device,
            "versions": versions(),
        }

    def fit(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return uint8 (H, W, 3) as the centre square that is measured: LANCZOS, then the crop."""
        if pixels.shape[:2] == (self.resolution, self.resolution):
            return pixels
        return np.asarray(crop_to_square(Image.fromarray(pixels), self.resolution))

    def measure_drawn(self, pixels: NDArray[np.uint8]) -> Arrays:
        """Measure drawn pictures, uint8 (N, H, H, 3): features, embeddings, logits if any."""
        found = self._extractor.extract(pixels)
        arrays = {"features": found.features, "embeddings": self._embed(pixels)}
        return arrays if found.logits is None else arrays | {"logits": found.logits}

    def measure_real(self, indices: Sequence[int]) -> Arrays:
        """Give features and embeddings of true pictures, measured once for all evaluations."""
        kept = self._real.read(indices)
        if kept is not None:
            return kept
        pixels = np.stack([self._true_image(index) for index in indices])
        return {
            "real_features": self._extractor.extract(pixels).features,
            "real_embeddings": self._embed(pixels),
        }

    def measure_text(self, lines: Sequence[str]) -> Arrays:
        """Embed dialogs beside the pictures; nothing without a text tower."""
        return {"text_embeddings": self._tower.embed(lines)} if self._tower else {}

    def _embed(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        return self._encoders.clip_image.encode(pixels, self._encoders.compute_batch_size)

    def _true_image(self, index: int) -> NDArray[np.uint8]:
        data = self._reader.read_image(index)
        if data is None:
            raise DataError(
                f"{self._reader.keys[index]} has no picture in the shards; expected its source "
                "bytes; prepare the data with --set preprocess.keep_images=always"
            )
        picture = decode_image(data, self._recipe.image)
        return np.asarray(crop_to_square(picture.image, self.resolution))


def generation_rows(generations: Sequence[Generation]) -> Arrays:
    """Say what became of each drawing: reason ('' for a picture), source, whether of one colour."""
    flat = [d.pixels is not None and np.ptp(d.pixels, axis=(0, 1)).max() == 0 for d in generations]
    return {
        "reasons": np.array([generation.reason for generation in generations]),
        "sources": np.array([d.source if d.pixels is not None else "" for d in generations]),
        "is_flat": np.array(flat),
    }
