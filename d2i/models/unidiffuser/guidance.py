"""Guidance of UniDiffuser: text-to-image sampling of latent and CLIP embedding as one state.

Guidance scale as in `d2i.diffusion.guidance`. Knows no network class, only its call.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import Literal

import torch
from torch import Tensor

from d2i.diffusion.dpm_solver import Eps
from d2i.diffusion.guidance import guide, twice
from d2i.errors import ConfigError

TEXT_TIME_CLEAN = 0.0
TEXT_TIME_NOISE = 1000.0

Unconditional = Literal["true_uncond", "empty_token"]


def guided_unidiffuser(
    network: Callable[..., tuple[Tensor, Tensor, Tensor]],
    text: Tensor,
    guidance_scale: float,
    latent_shape: tuple[int, int, int],
    *,
    unconditional: Unconditional = "true_uncond",
    text_noise: Callable[[int], Tensor] | None = None,
    empty_text: Tensor | None = None,
    data_type: int = 1,
) -> Eps:
    """Return UniDiffuser's text-to-image prediction on the joint state of latent and CLIP image.

    The returned function counts its calls to get fresh text noise: create one for each run of a
    sampler.

    Args:
        network: called as `network(latent, clip_image, text, n_image, n_text, data_type)`.
        text: (B, T, D) clean features of the condition.
        guidance_scale: 1 runs the conditional half alone; 8 as published.
        latent_shape: (4, h, w) of the latent part of the state.
        unconditional: `true_uncond` (published) uses pure noise as text, at text time 1000;
            `empty_token` uses the features of '', at text time 0.
        text_noise: for `true_uncond`: standard normal (B, T, D) for call k = 0, 1, ...
        empty_text: for `empty_token`: (T, D) features of ''.
        data_type: see `UniDiffuser.forward`.

    Returns:
        `eps(x, n)` on joint states (B, 4hw + C), see `join_state`, in the dtype of x.

    Raises:
        ConfigError: `unconditional` is neither of the two, or its argument is missing.
    """
    if guidance_scale == 1:
        return _conditional_unidiffuser(network, text, latent_shape, data_type)
    other_text = _unconditional_text(text, unconditional, text_noise, empty_text)
    other_time = TEXT_TIME_NOISE if unconditional == "true_uncond" else TEXT_TIME_CLEAN
    calls = count()

    def eps(x: Tensor, n: Tensor) -> Tensor:
        latent, clip_image = split_state(twice(x), latent_shape)  # (2B, 4, h, w), (2B, 1, C)
        both_texts = torch.cat([text, other_text(next(calls))])  # (2B, T, D)
        n_text = torch.cat([torch.zeros_like(n), torch.full_like(n, other_time)])  # (2B,)
        predicted = network(latent, clip_image, both_texts, twice(n), n_text, data_type)
        return guide(join_state(*predicted[:2]).to(x.dtype), guidance_scale)

    return eps


def join_state(latent: Tensor, clip_image: Tensor) -> Tensor:
    """Join (B, 4, h, w) and (B, 1, C) into the state (B, 4hw + C) that is sampled as one."""
    return torch.cat([latent.flatten(1), clip_image.flatten(1)], dim=1)


def split_state(state: Tensor, latent_shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Split a joint state (B, 4hw + C) into (B, 4, h, w) and (B, 1, C)."""
    channels, height, width = latent_shape
    size = channels * height * width
    return state[:, :size].reshape(-1, *latent_shape), state[:, size:][:, None]


def _conditional_unidiffuser(
    network: Callable[..., tuple[Tensor, Tensor, Tensor]],
    text: Tensor,
    latent_shape: tuple[int, int, int],
    data_type: int,
) -> Eps:
    def eps(x: Tensor, n: Tensor) -> Tensor:
        latent, clip_image = split_state(x, latent_shape)
        predicted = network(latent, clip_image, text, n, torch.zeros_like(n), data_type)
        return join_state(*predicted[:2]).to(x.dtype)

    return eps


def _unconditional_text(
    text: Tensor,
    unconditional: Unconditional,
    text_noise: Callable[[int], Tensor] | None,
    empty_text: Tensor | None,
) -> Callable[[int], Tensor]:
    """Return a function from the call number to the text of the unconditional half."""
    if unconditional == "true_uncond" and text_noise is not None:
        return lambda call: text_noise(call).to(text)
    if unconditional == "empty_token" and empty_text is not None:
        repeated = empty_text.to(text).expand_as(text)
        return lambda _: repeated
    raise ConfigError(
        f"unconditional is {unconditional!r}: expected 'true_uncond' with text_noise, "
        "or 'empty_token' with empty_text"
    )
