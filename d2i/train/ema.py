"""The moving average of the float32 weights, over whatever part of them this rank holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class Ema:
    """ema = rate * ema + (1 - rate) * weight, after every step, from the initial weights.

    Args:
        weights: The float32 tensors that the optimizer steps, which stay the same objects.
        rate: 0.9999 in U-ViT's published training.
    """

    def __init__(self, weights: Sequence[Tensor], rate: float) -> None:
        self.rate = rate
        self._weights = list(weights)
        self.tensors = [weight.detach().float().clone() for weight in weights]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights as they are now."""
        current = [weight.detach().float() for weight in self._weights]
        torch._foreach_lerp_(self.tensors, current, 1.0 - self.rate)

    @torch.no_grad()
    def read_in_place(self, read: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return what `read` gives while the averages stand in for the weights."""
        kept = [weight.detach().clone() for weight in self._weights]
        self._assign(self.tensors)
        try:
            return read()
        finally:
            self._assign(kept)

    def _assign(self, values: Sequence[Tensor]) -> None:
        for weight, value in zip(self._weights, values, strict=True):
            weight.data.copy_(value)
