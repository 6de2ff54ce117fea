"""A baseline that every generator should beat: the training image nearest to a dialog's text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from d2i.errors import ConfigError
from d2i.eval.features.text_tower import TextTower
from d2i.eval.prompts import Prompt
from d2i.eval.system import IN_MEMORY, Generation, SystemContext
from d2i.images.decode import decode_image
from d2i.shards import data_set_url

_NUM_ROWS = 1 << 16


def build(context: SystemContext) -> RetrieveSystem:
    """Read the embeddings of the training images of `retrieve:DIR`."""
    return RetrieveSystem(context)


class RetrieveSystem:
    """Compares CLIP text embeddings with the stored CLIP embeddings of all training images.

    Returns the source image where the shards keep it, else the VAE's decoding of the latent mean.
    """

    def __init__(self, context: SystemContext) -> None:
        self._reader = context.open_shards(data_set_url(context.spec.target, "train"))
        tower = TextTower.load(context.recipe, context.encoders, context.device)
        if tower is None or not len(self._reader):
            raise ConfigError(
                f"{context.spec.name}: got {len(self._reader)} training images and text tower "
                f"{context.recipe.metrics.clip_text}; expected at least one image, and the text "
                "tower of the CLIP image encoder; check --system retrieve:DIR and "
                "--set metrics.clip_text=PATH"
            )
        self._tower, self._encoders, self._limits = tower, context.encoders, context.recipe.image
        # Half precision, as stored: a million images take 1 GB.
        self._embeddings = np.concatenate(
            [
                _unit(self._reader.read(rows, members=("clip",))["clip"])
                for rows in np.array_split(
                    np.arange(len(self._reader)), -(-len(self._reader) // _NUM_ROWS)
                )
            ]
        )
        self.described = {
            "pictures": self._reader.manifest.sha256,
            "clip_text": tower.hash,
        }

    def generate(self, prompts: Sequence[Prompt]) -> list[Generation]:
        """Return the nearest image to each prompt; of equals, the first in the data set."""
        text = self._tower.embed([prompt.text for prompt in prompts])
        return [self._image(int(np.argmax(self._cosines(row)))) for row in text]

    def _cosines(self, row: NDArray[np.float32]) -> NDArray[np.float32]:
        parts = np.array_split(self._embeddings, -(-len(self._embeddings) // _NUM_ROWS))
        return np.concatenate([part.astype(np.float32) @ row for part in parts])

    def _image(self, index: int) -> Generation:
        data = self._reader.read_image(index)
        if data is None:
            vae = self._encoders.vae
            name = vae.codec.array
            stored = self._reader.read([index], members=(name,))[name]
            latents = vae.codec.mean(torch.from_numpy(stored.astype(np.float32)))
            pixels = vae.decode(latents, self._encoders.compute_batch_size)
            return Generation(pixels[0], source=IN_MEMORY)
        decoded = decode_image(data, self._limits)
        width, height = decoded.image.size
        return Generation(np.asarray(decoded.image), source=f"{decoded.suffix} {width}x{height}")


def _unit(rows: NDArray[np.float16]) -> NDArray[np.float16]:
    wide = rows.astype(np.float32)
    norms = np.linalg.norm(wide, axis=1, keepdims=True)
    unit: NDArray[np.float16] = (wide / np.maximum(norms, 1e-30)).astype(np.float16)
    return unit
