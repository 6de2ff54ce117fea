"""An image codec: the shapes and the arithmetic of latents, for one kind of autoencoder.

It holds no weights: `d2i.encoders.Vae` encodes and decodes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from d2i.diffusion.losses import sample_latent

VaeNumbers = Mapping[str, float]
"""The numbers that normalise latents, by diffusers' names: `scaling_factor`."""


@dataclass(frozen=True)
class ImageCodec:
    """Latents as a Gaussian's moments, scaled by one factor.

    Args:
        name: Its name, such as `kl-f8c4`.
        num_channels: Channels of a latent; its moments have twice as many.
        factor: Pixels to a latent pixel, along a side.
    """

    name: str
    num_channels: int
    factor: int = 8

    def latent_shape(self, side: int) -> tuple[int, int, int]:
        """Return the shape of one latent of a side in latent pixels: (C, side, side)."""
        return (self.num_channels, side, side)

    def mean(self, moments: Tensor) -> Tensor:
        """Return the raw latents at the mean: the first C of the channels (N, 2C, h, w)."""
        return moments[:, : self.num_channels]

    def raw(self, moments: Tensor, noise: Tensor) -> Tensor:
        """Sample raw latents (N, C, h, w) from moments (N, 2C, h, w) and standard normal noise."""
        return sample_latent(moments, noise, 1.0)

    def normalised(self, raw: Tensor, vae: VaeNumbers) -> Tensor:
        """Return the latents that a network is trained on, from raw ones."""
        return vae["scaling_factor"] * raw

    def denormalised(self, latents: Tensor, vae: VaeNumbers) -> Tensor:
        """Return raw latents, as the autoencoder decodes them, from a network's."""
        return latents / vae["scaling_factor"]


KL_F8C4 = ImageCodec("kl-f8c4", 4)
"""LDM's KL autoencoder, and the tiny one over the same latents."""
