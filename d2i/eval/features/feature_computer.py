"""Feature extraction: turns images and dialogs into the arrays that scores are computed from."""

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
from d2i.eval.features.extractors import build_extractor
from d2i.eval.features.reference_features import ReferenceFeatures
from d2i.eval.features.text_tower import TextTower
from d2i.eval.system import Generation
from d2i.images.decode import crop_to_square, decode_image
from d2i.shards import ShardReader

Arrays = dict[str, NDArray[Any]]


class FeatureComputer:
    """The feature extractor, CLIP's two towers, and the reference images.

    All networks run at one fixed, padded batch size.

    Args:
        recipe: Its image, text, encoders and metrics settings are used.
        encoders: The recipe's encoders.
        reader: The data set.
        device: Torch device of the extractor.
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
        """Return the names of the extractor and the text tower, for the metric card."""
        return {
            "extractor": self._extractor.name,
            "clip_text": self._tower.hash if self._tower else None,
        }

    def describe_real(self, device: str) -> dict[str, Any]:
        """Return all that the reference images' features depend on, as their cache key."""
        return {
            "manifest_sha256": self._reader.manifest.sha256,
            "extractor": self._extractor.name,
            "clip_image": self._encoders.clip_image.hash,
            # The limit on upscaling affects preprocessing alone.
            "image": self._recipe.image.model_dump(mode="json", exclude={"max_upscale"}),
            "resolution": self.resolution,
            "compute_batch_size": self._encoders.compute_batch_size,
            "device": device,
            "versions": versions(),
        }

    def fit(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return uint8 (H, W, 3) as the square to measure: centre crop, then LANCZOS."""
        if pixels.shape[:2] == (self.resolution, self.resolution):
            return pixels
        return np.asarray(crop_to_square(Image.fromarray(pixels), self.resolution))

    def measure_generated(self, pixels: NDArray[np.uint8]) -> Arrays:
        """Return features, embeddings, logits if any, of generated images, uint8 (N, H, H, 3)."""
        found = self._extractor.extract(pixels)
        arrays = {"features": found.features, "embeddings": self._embed(pixels)}
        return arrays if found.logits is None else arrays | {"logits": found.logits}

    def measure_real(self, indices: Sequence[int]) -> Arrays:
        """Return features and embeddings of reference images, from the cache where it has them."""
        kept = self._real.read(indices)
        if kept is not None:
            return kept
        pixels = np.stack([self._true_image(index) for index in indices])
        return {
            "real_features": self._extractor.extract(pixels).features,
            "real_embeddings": self._embed(pixels),
        }

    def measure_text(self, lines: Sequence[str]) -> Arrays:
        """Embed dialogs in the space of the image embeddings; {} without a text tower."""
        return {"text_embeddings": self._tower.embed(lines)} if self._tower else {}

    def _embed(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        return self._encoders.clip_image.encode(pixels, self._encoders.compute_batch_size)

    def _true_image(self, index: int) -> NDArray[np.uint8]:
        data = self._reader.read_image(index)
        if data is None:
            raise DataError(
                f"{self._reader.keys[index]}: the shards have no source image of it; prepare the "
                "data with --set preprocess.keep_images=always"
            )
        decoded = decode_image(data, self._recipe.image)
        return np.asarray(crop_to_square(decoded.image, self.resolution))


def generation_rows(generations: Sequence[Generation]) -> Arrays:
    """Return a row per generation: reason ('' for an image), source, and True if of one colour."""
    flat = [d.pixels is not None and np.ptp(d.pixels, axis=(0, 1)).max() == 0 for d in generations]
    return {
        "reasons": np.array([generation.reason for generation in generations]),
        "sources": np.array([d.source if d.pixels is not None else "" for d in generations]),
        "is_flat": np.array(flat),
    }
