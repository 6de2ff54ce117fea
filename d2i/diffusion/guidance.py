"""Classifier-free guidance: turns a network and its conditions into the `eps` of a sampler.

eps = uncond + guidance_scale (cond - uncond); papers that write cond + s (cond - uncond) mean
guidance_scale = 1 + s. Both halves run as one batch of 2B. Knows no network class.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor

from d2i.diffusion.dpm_solver import Eps

Given = TypeVar("Given", Tensor, Mapping[str, Tensor])
"""The conditions of a batch: one tensor (B, ...), or several by name."""


def guided(
    network: Callable[[Tensor, Tensor, Given], Tensor],
    conditions: Given,
    unconditional: Given,
    guidance_scale: float,
) -> Eps:
    """Return the guided noise prediction of a network.

    Args:
        network: called as `network(latent, n, conditions)`.
        conditions: (B, ...) each, such as text features (B, T, D).
        unconditional: those of the empty text, without the batch axis.
        guidance_scale: 1 runs the conditional half alone; 2 as published for U-ViT.

    Returns:
        `eps(x, n)` on latents (B, 4, h, w), in the dtype of x.
    """
    if guidance_scale == 1:
        return lambda x, n: network(x, n, conditions).to(x.dtype)
    both = _with_unconditional(conditions, unconditional)

    def eps(x: Tensor, n: Tensor) -> Tensor:
        predicted = network(twice(x), twice(n), both).to(x.dtype)  # (2B, 4, h, w)
        return guide(predicted, guidance_scale)

    return eps


def _with_unconditional(conditions: Given, unconditional: Given) -> Given:
    if isinstance(conditions, Tensor):
        return torch.cat([conditions, unconditional.to(conditions).expand_as(conditions)])
    return {name: _with_unconditional(conditions[name], unconditional[name]) for name in conditions}


def twice(tensor: Tensor) -> Tensor:
    """Repeat a batch (B, ...) for both halves: (2B, ...)."""
    return torch.cat([tensor, tensor])


def guide(predicted: Tensor, guidance_scale: float) -> Tensor:
    """Combine the two halves of a prediction (2B, ...), conditional first, to (B, ...)."""
    conditional, unconditional = predicted.chunk(2)  # each (B, ...)
    return conditional + (guidance_scale - 1.0) * (conditional - unconditional)
