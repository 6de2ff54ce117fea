"""The moving average of the float32 weights, over whatever part of them this rank holds."""

from __future__ import annotations

from collections.abc import Sequence

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
