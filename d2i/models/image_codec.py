"""Image codecs: the arrays that shards hold of an image, and the arithmetic of its latents.

There is one for each kind of autoencoder, and it holds no weights: `d2i.encoders.Vae` encodes and
decodes. *Raw* latents are those that an autoencoder encodes to and decodes from; *normalised* ones
are those that a network is trained on.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from d2i.diffusion.losses import sample_latent

VaeNumbers = Mapping[str, Any]
"""The numbers of one autoencoder that normalise its latents, by diffusers' names.

`scaling_factor` and, where there is one, `shift_factor`; for FLUX.2, `batch_norm_eps` and a list
each of `bn_running_mean` and `bn_running_var`.
"""


@dataclass(frozen=True)
class ImageCodec(ABC):
    """The latents of one kind of autoencoder.

    Args:
        name: Its name, such as `kl-f8c4`.
        num_channels: Channels C of a raw latent.
        factor: Pixels to a raw latent pixel, along a side, as published.

    Attributes:
        array: The array of a sample that holds the encoded image, float16.
        patch_size: Raw latent pixels to one of a normalised latent, along a side.
    """

    name: str
    num_channels: int
    factor: int

    array: ClassVar[str]
    patch_size: ClassVar[int] = 1

    def latent_shape(self, side: int) -> tuple[int, int, int]:
        """Return the shape of one raw latent of a side in latent pixels: (C, side, side)."""
        return (self.num_channels, side, side)

    @abstractmethod
    def array_shape(self, side: int) -> tuple[int, int, int]:
        """Return the shape of `array` for one image of a side in latent pixels."""

    @abstractmethod
    def mean(self, stored: Tensor) -> Tensor:
        """Return the raw latents (N, C, h, w) at the mean of stored arrays (N, ...)."""

    @abstractmethod
    def raw(self, stored: Tensor, noise: Tensor) -> Tensor:
        """Draw raw latents (N, C, h, w) from stored arrays (N, ...).

        The noise (N, C, h, w) is standard normal.
        """

    @abstractmethod
    def numbers(self, module: Any) -> VaeNumbers:
        """Return the numbers of an autoencoder of this kind, as its own file gives them."""

    def numbers_of(self, vae: Any) -> VaeNumbers:
        """Return the numbers of an autoencoder, given as such numbers or as its module."""
        return vae if isinstance(vae, Mapping) else self.numbers(vae)

    @abstractmethod
    def normalised(self, raw: Tensor, vae: VaeNumbers) -> Tensor:
        """Return the latents that a network is trained on, from raw ones (N, C, h, w)."""

    @abstractmethod
    def denormalised(self, latents: Tensor, vae: VaeNumbers) -> Tensor:
        """Return raw latents (N, C, h, w), the inverse of `normalised`."""


class KlCodec(ImageCodec):
    """A Gaussian's moments: `moments` (2C, h, w), the mean, then the log-variance.

    A network is trained on (raw - shift) times scale.
    """

    array = "moments"

    def array_shape(self, side: int) -> tuple[int, int, int]:
        """Return (2C, side, side)."""
        return (2 * self.num_channels, side, side)

    def mean(self, stored: Tensor) -> Tensor:
        """Return the first half of the channels."""
        return stored.chunk(2, dim=1)[0]

    def raw(self, stored: Tensor, noise: Tensor) -> Tensor:
        """Sample the Gaussian; see `ImageCodec.raw`."""
        return sample_latent(stored, noise, 1.0)

    def numbers(self, module: Any) -> VaeNumbers:
        """Return the scale, and the shift, which is 0 where the autoencoder has none."""
        config = module.config
        return {"scaling_factor": config.scaling_factor, "shift_factor": config.shift_factor or 0.0}

    def normalised(self, raw: Tensor, vae: VaeNumbers) -> Tensor:
        """Shift and scale; see `ImageCodec.normalised`."""
        return raw.sub(vae.get("shift_factor", 0.0)).mul(vae["scaling_factor"])

    def denormalised(self, latents: Tensor, vae: VaeNumbers) -> Tensor:
        """Scale and shift back; see `ImageCodec.denormalised`."""
        return latents.div(vae["scaling_factor"]).add(vae.get("shift_factor", 0.0))


class Flux2Codec(KlCodec):
    """FLUX.2's moments, normalised in patches of 2 x 2 by the statistics of a batch norm.

    A network is trained on (N, 4C, h/2, w/2): the pixels of a patch become channels, row by row,
    and each channel loses its mean and is divided by its deviation
    (`Flux2KleinPipeline._encode_vae_image` of diffusers).
    """

    patch_size = 2

    def numbers(self, module: Any) -> VaeNumbers:
        """Return the batch norm's running mean, variance and epsilon."""
        return {
            "batch_norm_eps": module.config.batch_norm_eps,
            "bn_running_mean": module.bn.running_mean.tolist(),
            "bn_running_var": module.bn.running_var.tolist(),
        }

    def normalised(self, raw: Tensor, vae: VaeNumbers) -> Tensor:
        """Return (N, 4C, h/2, w/2) from raw latents (N, C, h, w)."""
        mean, deviation = _statistics(vae, raw)
        return (pixel_unshuffle(raw, self.patch_size) - mean) / deviation

    def denormalised(self, latents: Tensor, vae: VaeNumbers) -> Tensor:
        """Return raw latents (N, C, h, w) from (N, 4C, h/2, w/2)."""
        mean, deviation = _statistics(vae, latents)
        return pixel_shuffle(latents * deviation + mean, self.patch_size)


def _statistics(vae: VaeNumbers, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and the deviation of each channel, (1, 4C, 1, 1), computed in float32."""
    mean, variance = (
        torch.tensor(vae[name], dtype=torch.float32).view(1, -1, 1, 1)
        for name in ("bn_running_mean", "bn_running_var")
    )
    return mean.to(like), torch.sqrt(variance + vae["batch_norm_eps"]).to(like)


class DcAeCodec(ImageCodec):
    """A latent without a variance: `latent` (C, h, w). A network is trained on it, scaled."""

    array = "latent"

    def array_shape(self, side: int) -> tuple[int, int, int]:
        """Return (C, side, side)."""
        return self.latent_shape(side)

    def mean(self, stored: Tensor) -> Tensor:
        """Return the stored latents."""
        return stored

    def raw(self, stored: Tensor, noise: Tensor) -> Tensor:
        """Return the stored latents, in the noise's dtype; there is nothing to draw."""
        return stored.to(noise.dtype)

    def numbers(self, module: Any) -> VaeNumbers:
        """Return the scale."""
        return {"scaling_factor": module.config.scaling_factor}

    def normalised(self, raw: Tensor, vae: VaeNumbers) -> Tensor:
        """Scale; see `ImageCodec.normalised`."""
        return raw.mul(vae["scaling_factor"])

    def denormalised(self, latents: Tensor, vae: VaeNumbers) -> Tensor:
        """Scale back; see `ImageCodec.denormalised`."""
        return latents.div(vae["scaling_factor"])


class QwenImageCodec(KlCodec):
    """Qwen-Image's moments, where each channel loses its mean and is divided by its deviation.

    Its autoencoder reads frames of a video; the axis of frames, of length 1, is left out here.
    """

    def numbers(self, module: Any) -> VaeNumbers:
        """Return the mean and the deviation of each channel."""
        config = module.config
        return {"latents_mean": config.latents_mean, "latents_std": config.latents_std}

    def normalised(self, raw: Tensor, vae: VaeNumbers) -> Tensor:
        """Subtract the mean, divide by the deviation; see `ImageCodec.normalised`."""
        return (raw - _channels(vae["latents_mean"], raw)) / _channels(vae["latents_std"], raw)

    def denormalised(self, latents: Tensor, vae: VaeNumbers) -> Tensor:
        """Return the inverse; see `ImageCodec.denormalised`."""
        mean, deviation = (_channels(vae[f"latents_{name}"], latents) for name in ("mean", "std"))
        return latents * deviation + mean


def _channels(numbers: Any, like: Tensor) -> Tensor:
    return torch.tensor(numbers).view(1, -1, 1, 1).to(like)


KL_F8C4 = KlCodec("kl-f8c4", num_channels=4, factor=8)
"""LDM's KL autoencoder, Stable Diffusion's, and the tiny one over the same latents."""
KL_F8C16 = KlCodec("kl-f8c16", num_channels=16, factor=8)
"""The autoencoders of SD3, FLUX.1 and Z-Image, and the tiny ones over the same latents."""
FLUX2 = Flux2Codec("flux2", num_channels=32, factor=8)
"""FLUX.2's autoencoder."""
DC_AE_F32 = DcAeCodec("dc-ae-f32", num_channels=32, factor=32)
"""Sana's deep compression autoencoder."""
QWEN_IMAGE = QwenImageCodec("qwen-image", num_channels=16, factor=8)
"""Qwen-Image's autoencoder: its arithmetic alone, as d2i encodes with none yet."""

CODECS: tuple[ImageCodec, ...] = (KL_F8C4, KL_F8C16, FLUX2, DC_AE_F32)


def find_codec(shapes: Mapping[str, tuple[int, ...]]) -> ImageCodec | None:
    """Return the codec of a data set, from the shapes of its arrays by name; None if unknown."""
    for codec in CODECS:
        shape = shapes.get(codec.array, ())
        if len(shape) == 3 and shape[0] == codec.array_shape(1)[0]:
            return codec
    return None
