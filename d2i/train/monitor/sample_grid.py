"""`samples/step-N.png`: images of fixed validation dialogs, generated from a checkpoint.

Each dialog is a column: the reference image above, the generated one below. They are generated in
few steps on one device, so that training waits little: for visual checks, not for scores.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from d2i.config import ImageConfig, Recipe
from d2i.diffusion.draws import SampleDraws
from d2i.encoders import Vae
from d2i.encoders.data_fingerprint import check_encoder_hashes
from d2i.encoders.pipeline_text import DTYPES, Encoded
from d2i.images.decode import crop_to_square, decode_image, png_bytes
from d2i.io import storage
from d2i.models.registry import family_of_backbone
from d2i.shards import ShardReader
from d2i.train.checkpoint.checkpoint_files import KIND_OF_WEIGHTS, Checkpoint
from d2i.train.data.text_source import TextSource
from d2i.train.monitor.validation import choose_instances
from d2i.train.network import build_with_trained

_NUM_DIALOGS = 8
_NUM_STEPS = 20
_PURPOSE = "train.sample"


class SampleGrid:
    """Generates images of the same validation dialogs from any checkpoint.

    Args:
        recipe: Encoders, kind of weights, guidance and seed.
        reader: The validation shards.
        device: Device of the networks.
        text: The text of its samples.

    Raises:
        CheckpointError: If the autoencoder cannot be loaded, decodes other latents than the
            network's, or did not make the shards.
    """

    def __init__(
        self,
        recipe: Recipe,
        reader: ShardReader,
        device: torch.device,
        text: TextSource,
    ) -> None:
        self._recipe, self._device = recipe, device
        self._vae = Vae(recipe.encoders.vae, recipe.encoders.vae_kind, str(device))
        name = recipe.backbone.name
        self._vae.check_codec(family_of_backbone(name).codec, name)
        check_encoder_hashes({"vae": self._vae.hash}, reader.manifest, reader.url)
        rows = choose_instances(len(reader), _NUM_DIALOGS, recipe.train.seed)
        self._keys = [reader.keys[int(row)] for row in rows]
        self._true = [reader.read_image(int(row)) for row in rows]
        self._conditions = self._tensors(text.read(rows))
        self._unconditional = self._tensors(text.empty)

    def generate(self, checkpoint: Checkpoint, url: str) -> None:
        """Generate the grid with a checkpoint's weights (`sample.weights`); write it as PNG."""
        network = self._network(checkpoint)
        with torch.inference_mode():
            latents = self._sample_latents(network)
        pixels = self._vae.decode(latents, len(self._keys))
        columns = [
            np.concatenate([_image(true, pixels.shape[1]), generated])
            for true, generated in zip(self._true, pixels, strict=True)
        ]
        metadata = {
            "keys": " ".join(self._keys),
            "step": str(checkpoint.progress.step),
            "weights_kind": self._recipe.sample.weights,
        }
        storage.write_bytes(url, png_bytes(np.concatenate(columns, axis=1), metadata))

    def _network(self, checkpoint: Checkpoint) -> Any:
        kind = KIND_OF_WEIGHTS[self._recipe.sample.weights]
        network = build_with_trained(self._recipe, dict(checkpoint.read_whole(kind)))
        # As the stock pipeline would hold it; others are sampled in float32.
        is_flow = family_of_backbone(self._recipe.backbone.name).presets.is_flow
        dtype = DTYPES[self._recipe.sample.precision] if is_flow else torch.float32
        return network.to(self._device, dtype).eval().requires_grad_(False)

    def _sample_latents(self, network: Any) -> Tensor:
        """Generate the unscaled latents of all dialogs, in few steps."""
        family = family_of_backbone(self._recipe.backbone.name)
        sampler = "pipeline" if family.presets.pipeline else "dpm_solver"
        few_steps = {"sampler": sampler, "num_steps": _NUM_STEPS}
        settings = self._recipe.sample.model_copy(update=few_steps)
        sample = family.sampler(network, settings, self._unconditional)
        seeds = [self._recipe.train.seed] * len(self._keys)
        latents = sample(self._conditions, SampleDraws(seeds, self._keys, _PURPOSE))
        return family.codec.denormalised(latents, family.vae_numbers(network))

    def _tensors(self, text: Encoded) -> dict[str, Tensor]:
        return {
            name: torch.from_numpy(rows.astype(np.float32)).to(self._device)
            for name, rows in text.items()
        }


def _image(data: bytes | None, side: int) -> NDArray[np.uint8]:
    """Return the reference image at the network's own size; grey if it was not kept."""
    if data is None:
        return np.full((side, side, 3), 128, np.uint8)
    return np.asarray(crop_to_square(decode_image(data, ImageConfig()).image, side), np.uint8)
