"""The VAE: images to unscaled moments, unscaled latents to images."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from d2i.config import Precision
from d2i.encoders.pretrained import (
    check_sibling_checksums,
    freeze,
    load_pretrained,
    padded_batches,
    run_padded,
    weights_hash,
)
from d2i.errors import CheckpointError
from d2i.models.image_codec import KL_F8C4
from d2i.weights_resolve import resolve_weights

# Stands for "no noise": exp(0.5 * -30) is 3e-7 of a latent's standard deviation.
NO_LOG_VARIANCE = -30.0
# Low-memory loading would need one more package, for networks of at most 0.3 GB.
_PLAIN_LOADING = {"low_cpu_mem_usage": False}


class Vae:
    """A frozen autoencoder over the latents of `codec`.

    Args:
        name: A shipped name, a directory, a hub repository, or a file: LDM's published
            `autoencoder_kl.pth`, converted on load, or one with diffusers' key names.
        kind: `kl` for AutoencoderKL, `tiny` for AutoencoderTiny.
        device: The device that it runs on.
        precision: The precision of encoding; decoding runs in float32.

    Attributes:
        codec: Shapes and arithmetic of its latents.
        downsampling: Pixels to a latent pixel, along a side.

    Raises:
        CheckpointError: If it cannot be loaded, or has latents of another number of channels.
    """

    codec = KL_F8C4

    def __init__(
        self,
        name: str,
        kind: Literal["kl", "tiny"],
        device: str = "cpu",
        precision: Precision = "fp32",
    ) -> None:
        self.kind = kind
        self.device, self._precision = device, precision
        self.module = _load(name, kind).to(device)
        if self.module.config.latent_channels != self.codec.num_channels:
            raise CheckpointError(
                f"encoders.vae {name}: got latents of {self.module.config.latent_channels} "
                f"channels, expected {self.codec.num_channels}, as of {self.codec.name}; use the "
                "autoencoder that the backbone was trained with"
            )
        # One block of the encoder does not halve the side.
        self.downsampling: int = 2 ** (len(self.module.config.block_out_channels) - 1)
        self.hash = weights_hash(self.module)

    @torch.inference_mode()
    def encode(self, pixels: NDArray[np.uint8], batch_size: int) -> NDArray[np.float32]:
        """Encode uint8 (N, H, W, 3) to unscaled moments float32 (N, 8, h, w).

        The first 4 channels are the mean, the last 4 the log-variance (-30 where there is none).
        Pixels enter as x / 127.5 - 1 (`datasets.py:453-458` of U-ViT).
        """
        return run_padded(self._moments, pixels, batch_size, self.device, self._precision)

    @torch.inference_mode()
    def decode(self, latents: Tensor, batch_size: int) -> NDArray[np.uint8]:
        """Decode unscaled latents (N, 4, h, w) to uint8 (N, H, W, 3)."""
        images = []
        for batch, count in padded_batches(latents.float().cpu().numpy(), batch_size):
            decoded = self.module.decode(torch.from_numpy(batch).to(self.device)).sample[:count]
            images.append(_to_uint8(decoded))
        return np.concatenate(images)

    def _moments(self, pixels_nhwc: Tensor) -> Tensor:
        images = pixels_nhwc.permute(0, 3, 1, 2).float().div(127.5).sub(1.0)  # (N, 3, H, W)
        if self.kind == "kl":
            moments: Tensor = self.module.encode(images).latent_dist.parameters
            return moments
        mean: Tensor = self.module.encode(images).latents
        return torch.cat([mean, torch.full_like(mean, NO_LOG_VARIANCE)], dim=1)


def _load(name: str, kind: Literal["kl", "tiny"]) -> Any:
    from diffusers import AutoencoderKL, AutoencoderTiny

    path = Path(resolve_weights(name))
    if kind == "kl":
        if path.is_file():
            return _load_kl_file(path)
        return load_pretrained(AutoencoderKL, name, **_PLAIN_LOADING)
    if path.suffix == ".safetensors":
        check_sibling_checksums(path)
        return _load_tiny_file(path, AutoencoderTiny())
    return load_pretrained(AutoencoderTiny, name, **_PLAIN_LOADING)


def _load_kl_file(path: Path) -> Any:
    from diffusers import AutoencoderKL

    from d2i.models.weights.autoencoder_layout import autoencoder_config
    from d2i.models.weights.source import checked_autoencoder, open_source

    source = open_source(path)
    if source.found.kind != "autoencoder":
        raise CheckpointError(
            f"{path} is {source.found.words}; expected a KL autoencoder; check --set encoders.vae"
        )
    state = checked_autoencoder(source)
    config = {key: v for key, v in autoencoder_config(state).items() if key != "_class_name"}
    module: Any = AutoencoderKL(**config)
    module.load_state_dict({key: value.float() for key, value in state.items()})
    return freeze(module)


def _load_tiny_file(path: Path, module: Any) -> Any:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        # The small public copy is stored in fp8; the network runs in float32.
        state = {key: value.float() for key, value in load_file(path).items()}
        module.load_state_dict(state, strict=True)
    except (OSError, SafetensorError, RuntimeError) as err:
        reason = str(err).strip().splitlines()[0][:200]
        raise CheckpointError(
            f"{path}: cannot load AutoencoderTiny: {reason}; expected a safetensors file with "
            "diffusers' key names; check --set encoders.vae"
        ) from err
    return freeze(module)


def _to_uint8(images_nchw: Tensor) -> NDArray[np.uint8]:
    images = images_nchw.float().add(1.0).mul(127.5).round().clamp(0, 255).to(torch.uint8)
    array: NDArray[np.uint8] = images.permute(0, 2, 3, 1).contiguous().cpu().numpy()
    return array
