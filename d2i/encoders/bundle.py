"""All encoders of one recipe, loaded once per worker."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from d2i.config import EncodersConfig, ImageConfig, Precision, TextConfig
from d2i.encoders.clip_image import ClipImage
from d2i.encoders.clip_text import ClipText, load_clip_text
from d2i.encoders.vae import Vae
from d2i.errors import ConfigError
from d2i.tokenize import WINDOW_LENGTH

if TYPE_CHECKING:
    # Images can be encoded without the packages that read shards.
    from d2i.shards import DeclaredArray

EncoderName = Literal["vae", "clip_image", "clip_text"]


class Encoders:
    """The frozen encoders of a recipe, on one device, each loaded when it is first used.

    Disables TF32 in cuDNN for this process: by default cuDNN rounds what a convolution multiplies
    to 10 bits.

    Args:
        config: The encoders' names, and their common batch size.
        device: The torch device to run on.
        precision: Of their weights.
    """

    def __init__(
        self, config: EncodersConfig, device: str = "cpu", precision: Precision = "fp32"
    ) -> None:
        torch.backends.cudnn.allow_tf32 = False
        self._config, self._device, self._precision = config, device, precision
        self.compute_batch_size = config.compute_batch_size

    @cached_property
    def vae(self) -> Vae:
        """The autoencoder of images."""
        return Vae(self._config.vae, self._config.vae_kind, self._device, self._precision)

    @cached_property
    def clip_image(self) -> ClipImage:
        """The image tower of CLIP."""
        return ClipImage(self._config.clip_image, self._device, self._precision)

    @cached_property
    def clip_text(self) -> ClipText | None:
        """The text encoder; None if the recipe has none, and no text is encoded."""
        if not self._config.clip_text:
            return None
        return load_clip_text(self._config, self._device, self._precision)

    def encode_images(self, pixels: NDArray[np.uint8]) -> dict[str, NDArray[np.float16]]:
        """Encode uint8 (N, H, H, 3) to the arrays of an image, by name, each (N, ...).

        A value beyond the range of float16 becomes infinite; the caller turns it into a failed row.
        """
        with np.errstate(over="ignore"):
            image = self.vae.encode(pixels, self.compute_batch_size).astype(np.float16)
            clip = self.clip_image.encode(pixels, self.compute_batch_size).astype(np.float16)
        return {self.vae.codec.array: image, "clip": clip}

    def encode_text(self, tokens: NDArray[np.uint16]) -> NDArray[np.float16]:
        """Encode uint16 (N, 77 W) to text latents f16 (N, 77 W, text_dim).

        A value beyond the range of float16 becomes infinite, as for images.
        """
        assert self.clip_text is not None
        with np.errstate(over="ignore"):
            return self.clip_text.encode(tokens, self.compute_batch_size).astype(np.float16)

    def arrays(self, image: ImageConfig, text: TextConfig) -> dict[str, DeclaredArray]:
        """Declare the arrays of every sample, by name, that these encoders make for a recipe.

        Raises:
            ConfigError: If the resolution is not a multiple of what the autoencoder needs.
        """
        from d2i.shards import DeclaredArray

        codec, clip_image, clip_text = self.vae.codec, self.clip_image, self.clip_text
        multiple = self.vae.downsampling * codec.patch_size
        if image.resolution % multiple:
            raise ConfigError(
                f"image.resolution={image.resolution}: expected a multiple of {multiple} for "
                f"an autoencoder of {codec.name}; change --set image.resolution or encoders.vae"
            )
        num_tokens = WINDOW_LENGTH * text.num_windows
        latents = codec.array_shape(image.resolution // self.vae.downsampling)
        shapes: dict[str, tuple[str, str, tuple[int, ...]]] = {
            codec.array: ("vae", "float16", latents),
            "clip": ("clip_image", "float16", (clip_image.dim,)),
        }
        if clip_text:
            shapes["tokens"] = ("tokenizer", "uint16", (num_tokens,))
        if clip_text and text.latents == "full":
            shapes["text"] = ("clip_text", "float16", (num_tokens, clip_text.dim))
        return {
            name: DeclaredArray(encoder=encoder, dtype=dtype, shape=shape)
            for name, (encoder, dtype, shape) in shapes.items()
        }

    @property
    def device_kind(self) -> str:
        """The name of the device model: encoded bytes are reproducible only on the same model."""
        device = torch.device(self.vae.device)
        return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type

    def hashes(self) -> dict[EncoderName, str]:
        """Return the sha256 of every encoder's weights, by name."""
        found: dict[EncoderName, str] = {"vae": self.vae.hash, "clip_image": self.clip_image.hash}
        return found if self.clip_text is None else found | {"clip_text": self.clip_text.hash}


def load_encoders(
    config: EncodersConfig, device: str = "cpu", precision: Precision = "fp32"
) -> Encoders:
    """Load all encoders of a recipe onto one device; see `Encoders`.

    Raises:
        CheckpointError: If one of them cannot be loaded.
    """
    encoders = Encoders(config, device, precision)
    # In the order in which they are named when several cannot be loaded.
    for name in ("clip_text", "vae", "clip_image"):
        getattr(encoders, name)
    return encoders


def versions() -> dict[str, str]:
    """Return the versions of the libraries that decide an encoded byte."""
    from importlib.metadata import version

    names = ("torch", "diffusers", "transformers", "numpy", "pillow")
    return {name: version(name) for name in names}
