"""Reconstruction: images encoded and decoded again by an autoencoder, beside the images."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from d2i.encoders.vae import Vae

# Rounding to 8 bits alone is off by this much, so that an exact image has a finite PSNR, 58.9 dB.
_ROUNDING_MSE = 1 / 12
POOR_PSNR_DB = 20.0
"""A lower PSNR of an autoencoder is worth a warning: between those measured of one that keeps
photographs and of one that loses them (benchmarks/README.md)."""
NUM_MEASURED = 8
"""Images that are encoded and decoded for a figure: enough to tell the two apart."""


@dataclass(frozen=True)
class Reconstruction:
    """The distance of some images from their reconstructions.

    Args:
        num_images: Number of the images.
        psnr_db: Their peak signal-to-noise ratio in dB, of each image at a peak of 255, averaged.
        mae: Mean absolute error of a colour value, on the scale of 0 to 255.
    """

    num_images: int
    psnr_db: float
    mae: float

    def warning(self, vae: str) -> str | None:
        """Return the warning about an autoencoder, by its name, in one line; None if it is good."""
        if self.psnr_db >= POOR_PSNR_DB:
            return None
        return (
            f"encoders.vae {vae} reconstructs these images poorly: got a PSNR of "
            f"{self.psnr_db:.1f} dB on {self.num_images} of them, expected {POOR_PSNR_DB:g} or "
            "more; no network trained on its latents can generate what they lose; prepare "
            "photographs with --recipe small, or with another --set encoders.vae"
        )


def reconstruct(vae: Vae, stored: NDArray[np.generic]) -> NDArray[np.uint8]:
    """Decode what shards store of images, (N, ...), at the mean: uint8 (N, H, W, 3)."""
    return vae.decode(vae.codec.mean(torch.from_numpy(stored)), batch_size=1)


def compare(images: NDArray[np.uint8], decoded: NDArray[np.uint8]) -> Reconstruction:
    """Compare images (N, H, W, 3), N >= 1, with their reconstructions, in the same order."""
    difference = images.astype(np.float64) - decoded
    mse = np.square(difference).mean(axis=(1, 2, 3)).clip(min=_ROUNDING_MSE)
    psnr_db = 10 * np.log10(255**2 / mse)
    return Reconstruction(
        num_images=len(images),
        psnr_db=round(float(psnr_db.mean()), 2),
        mae=round(float(np.abs(difference).mean()), 2),
    )


def measure(vae: Vae, images: NDArray[np.uint8]) -> Reconstruction:
    """Encode images (N, H, W, 3), round to the float16 of shards, decode, and compare."""
    with np.errstate(over="ignore"):
        stored = vae.encode(images, batch_size=1).astype(np.float16)
    return compare(images, reconstruct(vae, stored))
