"""All encoders of one recipe, loaded once per worker.

By the hashes of their weights they are compared with those that prepared a data set.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from d2i.config import EncodersConfig, ImageConfig, Precision, TextConfig
from d2i.encoders.clip_image import ClipImage
from d2i.encoders.clip_text import ClipText
from d2i.encoders.vae import Vae
from d2i.errors import CheckpointError
from d2i.tokenize import WINDOW_LENGTH

if TYPE_CHECKING:
    from d2i.shards import Manifest

EncoderName = Literal["vae", "clip_image", "clip_text"]
IMAGE_ARRAYS = ("moments", "clip")
"""The arrays that depend on the image alone, which other contexts can reuse."""
_PARTS = {"vae": "image", "clip_image": "image", "clip_text": "text"}
"""The part of a data set's fingerprint that holds the hash of each encoder's weights."""


@dataclass(frozen=True)
class EncodedArray:
    """An array of every sample.

    Args:
        encoder: The encoder that makes it, whose weights decide it; None for the tokenizer.
        dtype: As numpy names it.
        shape: Of one sample.
    """

    encoder: EncoderName | None
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Encoders:
    """The three frozen encoders and their common batch size."""

    vae: Vae
    clip_image: ClipImage
    clip_text: ClipText
    compute_batch_size: int

    def encode_images(self, pixels: NDArray[np.uint8]) -> dict[str, NDArray[np.float16]]:
        """Encode uint8 (N, H, H, 3) to the arrays of an image, by name, each (N, ...).

        A value beyond the range of float16 becomes infinite; the caller turns it into a failed row.
        """
        with np.errstate(over="ignore"):
            moments = self.vae.encode(pixels, self.compute_batch_size).astype(np.float16)
            clip = self.clip_image.encode(pixels, self.compute_batch_size).astype(np.float16)
        return dict(zip(IMAGE_ARRAYS, (moments, clip), strict=True))

    def encode_text(self, tokens: NDArray[np.uint16]) -> NDArray[np.float16]:
        """Encode uint16 (N, 77 W) to text latents f16 (N, 77 W, text_dim).

        A value beyond the range of float16 becomes infinite, as for images.
        """
        with np.errstate(over="ignore"):
            return self.clip_text.encode(tokens, self.compute_batch_size).astype(np.float16)

    def arrays(self, image: ImageConfig, text: TextConfig) -> dict[str, EncodedArray]:
        """Declare the arrays of every sample, by name, that these encoders make for a recipe."""
        side = image.resolution // self.vae.downsampling
        num_tokens = WINDOW_LENGTH * text.num_windows
        declared = {
            "moments": EncodedArray(
                "vae", "float16", (2 * self.vae.codec.num_channels, side, side)
            ),
            "clip": EncodedArray("clip_image", "float16", (self.clip_image.dim,)),
            "tokens": EncodedArray(None, "uint16", (num_tokens,)),
        }
        if text.latents == "full":
            declared["text"] = EncodedArray(
                "clip_text", "float16", (num_tokens, self.clip_text.dim)
            )
        return declared

    @property
    def device_kind(self) -> str:
        """The name of the device model: encoded bytes are reproducible only on the same model."""
        device = torch.device(self.vae.device)
        return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type

    def hashes(self) -> dict[EncoderName, str]:
        """Return the sha256 of every encoder's weights, by name."""
        return {
            "vae": self.vae.hash,
            "clip_image": self.clip_image.hash,
            "clip_text": self.clip_text.hash,
        }


def load_encoders(
    config: EncodersConfig, device: str = "cpu", precision: Precision = "fp32"
) -> Encoders:
    """Load the encoders of a recipe onto one device.

    Disables TF32 in cuDNN for this process: by default cuDNN rounds what a convolution multiplies
    to 10 bits.

    Raises:
        CheckpointError: If one of them cannot be loaded.
    """
    torch.backends.cudnn.allow_tf32 = False
    return Encoders(
        vae=Vae(config.vae, config.vae_kind, device, precision),
        clip_image=ClipImage(config.clip_image, device, precision),
        clip_text=ClipText(config.clip_text, config.text_prefix, device, precision),
        compute_batch_size=config.compute_batch_size,
    )


def versions() -> dict[str, str]:
    """Return the versions of the libraries that decide an encoded byte."""
    from importlib.metadata import version

    names: tuple[Any, ...] = ("torch", "diffusers", "transformers", "numpy", "pillow")
    return {name: version(name) for name in names}


def check_encoder_hashes(
    hashes: Mapping[EncoderName, str], manifest: Manifest, data_url: str
) -> None:
    """Refuse encoders whose weights differ from those that made a data set.

    Shards that d2i preprocess did not make name no encoder, and are accepted unchecked.

    Args:
        hashes: sha256 of weights, by encoder.
        manifest: Manifest of the data set.
        data_url: URL of the data set.

    Raises:
        CheckpointError: If they differ; it names the encoder.
    """
    fingerprint: Mapping[str, Any] = manifest.fingerprint
    for name, found in hashes.items():
        part = fingerprint.get(_PARTS[name])
        expected = part.get(name, found) if isinstance(part, dict) else found
        if found != expected:
            raise CheckpointError(
                f"encoders.{name}: got weights with sha256 {found[:16]}…; expected "
                f"{str(expected)[:16]}…, which prepared {data_url}; restore those weights, or "
                "prepare the data again"
            )
