"""Image sampler: text latents and keys in, uint8 images out, at one fixed, padded batch size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from d2i.config import BackboneConfig, SampleConfig
from d2i.diffusion.dpm_solver import OnStep
from d2i.diffusion.draws import SampleDraws
from d2i.diffusion.samplers import check_sampler
from d2i.encoders import Vae
from d2i.encoders.pretrained import matmul_precision, weights_hash
from d2i.errors import ConfigError
from d2i.models.base import SampleLatents
from d2i.models.model_dir import build_network
from d2i.models.registry import family_of_backbone


class Sampler:
    """A backbone, the VAE that decodes its latents, and the sampling settings.

    An image is a function of (seed, key, text latents): the network always runs at
    `config.compute_batch_size` rows, with the last batch padded, so other rows do not change it.

    Args:
        backbone: The network and its weights.
        vae: Decodes unscaled latents; `check_codec` says whether it decodes the network's.
        config: Steps, guidance, precision, seed and batch.
        empty_text: float (T, D), the text latents of ''.
        device: Torch device that the network runs on.

    Raises:
        ConfigError: If the network expects text latents of another shape.
    """

    def __init__(
        self,
        backbone: BackboneConfig,
        vae: Vae,
        config: SampleConfig,
        empty_text: NDArray[Any],
        device: str = "cpu",
    ) -> None:
        check_sampler(config.sampler)
        network: Any = build_network(backbone).to(device).eval().requires_grad_(False)
        self._vae, self._config, self._device = vae, config, device
        _check_text(empty_text.shape, network)
        empty = torch.from_numpy(empty_text.astype(np.float32)).to(device)
        self._family = family_of_backbone(backbone.name)
        self._vae_numbers = self._family.vae_numbers(network)
        self._network, self._unconditional = network, {"text": empty}
        self.hash = weights_hash(network)

    def generate(
        self, keys: Sequence[str], text: NDArray[Any], seeds: Sequence[int] | None = None
    ) -> NDArray[np.uint8]:
        """Generate one image per key.

        Args:
            keys: N keys; the noise of an image depends only on its key and seed.
            text: (N, T, D) text latents.
            seeds: N seeds; None uses the seed of the settings for all.

        Returns:
            uint8 (N, H, W, 3).
        """
        return self.decode(self.sample_latents(keys, text, seeds))

    def sample_latents(
        self,
        keys: Sequence[str],
        text: NDArray[Any],
        seeds: Sequence[int] | None = None,
        config: SampleConfig | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Generate the unscaled latents of one image per key: (N, 4, h, w); see `generate`.

        Args:
            keys: N keys.
            text: (N, T, D) text latents.
            seeds: N seeds; None uses the seed of the settings for all.
            config: Settings with other steps and guidance; None uses those it was built with.
            on_step: Called at each step of each batch of B images with the number of the step, from
                1, and the unscaled latents (B, 4, h, w) that it predicts.
        """
        size = self._config.compute_batch_size
        seeds = [self._config.seed] * len(keys) if seeds is None else seeds
        config = config or self._config
        sample = self._family.sampler(self._network, config, self._unconditional)
        latents = []
        for start in range(0, len(keys), size):
            rows = slice(start, start + size)
            draws = SampleDraws(seeds[rows], keys[rows])
            latents.append(self._sample_batch(sample, draws, text[rows], on_step))
        return torch.cat(latents)

    def decode(self, latents: Tensor) -> NDArray[np.uint8]:
        """Decode unscaled latents (N, 4, h, w), N >= 1, to uint8 (N, H, W, 3)."""
        return self._vae.decode(latents, self._config.compute_batch_size)

    @torch.inference_mode()
    def _sample_batch(
        self, sample: SampleLatents, draws: SampleDraws, text: NDArray[Any], on_step: OnStep | None
    ) -> Tensor:
        num_rows, size = len(draws.keys), self._config.compute_batch_size
        # Pad the batch with its first row.
        index = [row if row < num_rows else 0 for row in range(size)]
        padded = SampleDraws([draws.seeds[i] for i in index], [draws.keys[i] for i in index])
        rows = torch.from_numpy(text[index].astype(np.float32)).to(self._device)
        # A family of a user's own may have a sampler without this argument.
        watch = () if on_step is None else (self._watch(on_step, num_rows),)
        with matmul_precision(self._config.precision, self._device):
            latents = sample({"text": rows}, padded, *watch)
        return self._unscaled(latents, num_rows)

    def _watch(self, on_step: OnStep, num_rows: int) -> OnStep:
        return lambda step, latents: on_step(step, self._unscaled(latents, num_rows))

    def _unscaled(self, latents: Tensor, num_rows: int) -> Tensor:
        """Return the unscaled latents of the images of a batch, without padding."""
        return self._family.codec.denormalised(latents[:num_rows], self._vae_numbers)


def _check_text(found: tuple[int, ...], network: Any) -> None:
    expected = (network.num_text_tokens, network.text_dim)
    if found != expected:
        raise ConfigError(
            f"text latents: got shape {found} (tokens, features), expected {expected}, the input "
            "of the network; check text.num_windows, backbone.num_text_tokens and "
            "encoders.text_prefix"
        )
