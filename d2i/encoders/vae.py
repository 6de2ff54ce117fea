"""The VAE: images to the array that shards hold of them, raw latents to images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
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
    read_pretrained_config,
    run_padded,
    weights_hash,
)
from d2i.errors import CheckpointError
from d2i.models.image_codec import DC_AE_F32, FLUX2, KL_F8C4, KL_F8C16, ImageCodec
from d2i.weights_resolve import resolve_weights

# Stands for "no noise": exp(0.5 * -30) is 3e-7 of a latent's standard deviation.
NO_LOG_VARIANCE = -30.0
# Low-memory loading would need one more package, for networks of at most 1.3 GB.
_PLAIN_LOADING = {"low_cpu_mem_usage": False}


@dataclass(frozen=True)
class _Kind:
    """A class of diffusers that d2i reads.

    Args:
        name: As the fingerprint of data has it.
        codecs: Those that its weights may have.
        encode: From a module and pixels (N, 3, H, W) in -1..1 to the codec's array (N, ...).
    """

    name: str
    codecs: tuple[ImageCodec, ...]
    encode: Callable[[Any, Tensor], Tensor]


def _moments(module: Any, pixels: Tensor) -> Tensor:
    moments: Tensor = module.encode(pixels).latent_dist.parameters
    return moments


def _moments_without_variance(module: Any, pixels: Tensor) -> Tensor:
    mean: Tensor = module.encode(pixels).latents
    return torch.cat([mean, torch.full_like(mean, NO_LOG_VARIANCE)], dim=1)


def _latent(module: Any, pixels: Tensor) -> Tensor:
    latent: Tensor = module.encode(pixels).latent
    return latent


_KINDS = {
    "AutoencoderKL": _Kind("kl", (KL_F8C4, KL_F8C16), _moments),
    "AutoencoderTiny": _Kind("tiny", (KL_F8C4, KL_F8C16), _moments_without_variance),
    "AutoencoderKLFlux2": _Kind("flux2", (FLUX2,), _moments),
    "AutoencoderDC": _Kind("dc-ae", (DC_AE_F32,), _latent),
}
"""By the name of the class."""


class Vae:
    """A frozen autoencoder.

    Args:
        name: A shipped name, a directory, a hub repository, or a file: LDM's published
            `autoencoder_kl.pth`, converted on load, or one with diffusers' key names.
        kind: Of a single file, `kl` for AutoencoderKL and `tiny` for AutoencoderTiny. The
            `config.json` of a directory names its class.
        device: The device that it runs on.
        precision: The precision of encoding; decoding runs in float32.

    Attributes:
        codec: Shapes and arithmetic of its latents.
        kind: `kl`, `tiny`, `flux2` or `dc-ae`, by its class.
        downsampling: Pixels to a raw latent pixel, along a side.

    Raises:
        CheckpointError: If it cannot be loaded, is of another class, or has latents of no codec.
    """

    def __init__(
        self,
        name: str,
        kind: Literal["kl", "tiny"],
        device: str = "cpu",
        precision: Precision = "fp32",
    ) -> None:
        self.device, self._precision = device, precision
        self._name = name
        self.module = _load(name, kind).to(device)
        self._kind = _KINDS[type(self.module).__name__]
        self.kind = self._kind.name
        self.codec = _codec_of(name, self.module, self._kind)
        config = self.module.config
        blocks = config.get("block_out_channels") or config["encoder_block_out_channels"]
        # One block of the encoder does not halve the side.
        self.downsampling: int = 2 ** (len(blocks) - 1)
        self.hash = weights_hash(self.module)

    @torch.inference_mode()
    def encode(self, pixels: NDArray[np.uint8], batch_size: int) -> NDArray[np.float32]:
        """Encode uint8 (N, H, W, 3) to the array of the codec, unscaled: float32 (N, ...).

        Moments (N, 2C, h, w) are the mean, then the log-variance: -30 where there is none. Pixels
        enter as x / 127.5 - 1 (`datasets.py:453-458` of U-ViT).
        """
        return run_padded(self._encode, pixels, batch_size, self.device, self._precision)

    @torch.inference_mode()
    def decode(self, latents: Tensor, batch_size: int) -> NDArray[np.uint8]:
        """Decode raw latents (N, C, h, w) to uint8 (N, H, W, 3)."""
        images = []
        for batch, count in padded_batches(latents.float().cpu().numpy(), batch_size):
            decoded = self.module.decode(torch.from_numpy(batch).to(self.device)).sample[:count]
            images.append(_to_uint8(decoded))
        return np.concatenate(images)

    def check_codec(self, expected: ImageCodec, backbone: str) -> None:
        """Refuse to decode the latents of a network that is trained on those of another codec.

        Raises:
            CheckpointError: If it is.
        """
        if self.codec != expected:
            raise CheckpointError(
                f"encoders.vae {self._name}: got latents of {self.codec.name}, expected those of "
                f"{expected.name}, on which {backbone} is trained; check --set encoders.vae"
            )

    def _encode(self, pixels_nhwc: Tensor) -> Tensor:
        images = pixels_nhwc.permute(0, 3, 1, 2).float().div(127.5).sub(1.0)  # (N, 3, H, W)
        return self._kind.encode(self.module, images)


def _load(name: str, kind: Literal["kl", "tiny"]) -> Any:
    import diffusers

    path = Path(resolve_weights(name))
    if kind == "kl" and path.is_file():
        return _load_kl_file(path)
    if kind == "tiny" and path.suffix == ".safetensors":
        check_sibling_checksums(path)
        return _load_tiny_file(path, diffusers.AutoencoderTiny())
    default = "AutoencoderKL" if kind == "kl" else "AutoencoderTiny"
    class_name = read_pretrained_config(getattr(diffusers, default), name).get("_class_name")
    if (class_name or default) not in _KINDS:
        raise CheckpointError(
            f"encoders.vae {name}: got {class_name}, expected one of {', '.join(_KINDS)}; use an "
            "autoencoder of such a class"
        )
    return load_pretrained(getattr(diffusers, class_name or default), name, **_PLAIN_LOADING)


def _codec_of(name: str, module: Any, kind: _Kind) -> ImageCodec:
    """Return the codec with the number of channels of an autoencoder."""
    num_channels = module.config.latent_channels
    for codec in kind.codecs:
        if codec.num_channels == num_channels:
            return codec
    known = " or ".join(f"{codec.num_channels} ({codec.name})" for codec in kind.codecs)
    raise CheckpointError(
        f"encoders.vae {name}: got {type(module).__name__} with latents of {num_channels} "
        f"channels, expected {known}; use the autoencoder that the backbone was trained with"
    )


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
