"""Draw pictures: text latents and keys in, uint8 pictures out, at one fixed, padded batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from d2i.config import BackboneConfig, SampleConfig
from d2i.diffusion import dpm_solver, guided_unidiffuser, guided_uvit, join_state, split_state
from d2i.diffusion.draws import normal
from d2i.encoders import Vae
from d2i.encoders.load import weights_hash
from d2i.models import UniDiffuser
from d2i.models.folder import build_network


class Sampler:
    """A backbone, the VAE that decodes its latents, and how to draw.

    A picture is a function of (seed, key, text latents): the network always runs at
    `config.compute_batch_size` rows, the last batch padded, so no neighbour changes it.

    Args:
        backbone: The network and its weights.
        vae: Decodes unscaled latents.
        config: Steps, guidance, seed and batch.
        empty_text: float (T, D), the text latents of ''.
        device: Where the network runs.
    """

    def __init__(
        self,
        backbone: BackboneConfig,
        vae: Vae,
        config: SampleConfig,
        empty_text: NDArray[Any],
        device: str = "cpu",
    ) -> None:
        self._network: Any = build_network(backbone).to(device).eval().requires_grad_(False)
        self._vae, self._config, self._device = vae, config, device
        self._empty_text = torch.from_numpy(empty_text.astype(np.float32)).to(device)
        self.hash = weights_hash(self._network)

    def draw(self, keys: Sequence[str], text: NDArray[Any]) -> NDArray[np.uint8]:
        """Draw one picture a key.

        Args:
            keys: N keys; the noise of a picture depends on its key alone.
            text: (N, T, D) text latents.

        Returns:
            uint8 (N, H, W, 3).
        """
        return self.decode(self.draw_latents(keys, text))

    def draw_latents(self, keys: Sequence[str], text: NDArray[Any]) -> Tensor:
        """Draw the unscaled latents of one picture a key: (N, 4, h, w), as `draw` does."""
        size = self._config.compute_batch_size
        latents = [
            self._draw_batch(keys[start : start + size], text[start : start + size])
            for start in range(0, len(keys), size)
        ]
        return torch.cat(latents)

    def decode(self, latents: Tensor) -> NDArray[np.uint8]:
        """Decode unscaled latents (N, 4, h, w), N >= 1, to uint8 (N, H, W, 3)."""
        return self._vae.decode(latents, self._config.compute_batch_size)

    @torch.inference_mode()
    def _draw_batch(self, keys: Sequence[str], text: NDArray[Any]) -> Tensor:
        num_padded = self._config.compute_batch_size - len(keys)
        padded_keys = [*keys, *[keys[0]] * num_padded]
        padded_text = np.concatenate([text, np.repeat(text[:1], num_padded, axis=0)])
        rows = torch.from_numpy(padded_text.astype(np.float32)).to(self._device)
        if isinstance(self._network, UniDiffuser):
            latents = self._draw_unidiffuser(padded_keys, rows)
        else:
            latents = self._draw_uvit(padded_keys, rows)
        unscaled: Tensor = latents[: len(keys)] / self._network.latent_scale
        return unscaled

    def _draw_uvit(self, keys: Sequence[str], text: Tensor) -> Tensor:
        eps = guided_uvit(self._network, text, self._empty_text, self._config.guidance_scale)
        return dpm_solver(eps, self._noise("sample", keys, self._shape), self._config.num_steps)

    def _draw_unidiffuser(self, keys: Sequence[str], text: Tensor) -> Tensor:
        state = join_state(
            self._noise("sample", keys, self._shape),
            self._noise("sample.clip", keys, (1, self._network.clip_dim)),
        )
        eps = guided_unidiffuser(
            self._network,
            text,
            self._config.guidance_scale,
            self._shape,
            text_noise=lambda call: self._noise("sample.text", keys, text.shape[1:], call),
        )
        solved = dpm_solver(eps, state, self._config.num_steps)
        return split_state(solved, self._shape)[0]

    @property
    def _shape(self) -> tuple[int, int, int]:
        return (4, self._network.latent_size, self._network.latent_size)

    def _noise(
        self, purpose: str, keys: Sequence[str], shape: tuple[int, ...], step: int = 0
    ) -> Tensor:
        drawn = normal(self._config.seed, purpose, keys, step, tuple(shape))
        return torch.from_numpy(drawn).to(self._device)
