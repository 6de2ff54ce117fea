"""Moving averages (EMA) of the float32 weights, for the part of them that this rank holds.

The decay is the share of the average that a step keeps. It is a function of the optimizer step
k = 1, 2, … alone, not of the planned length of a run, so a run may be trained longer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

Decay = Callable[[int], float]


def warmup_decay(rate: float) -> Decay:
    """Return a decay with warm-up, to forget the initial weights: 0, 2/11, 3/12, …, up to `rate`.

    After step k it is 0 for k = 1, else min(rate, k / (9 + k)), as diffusers' `EMAModel.get_decay`.
    Until `rate` is reached this is the power function of gamma 8 (`power_decay`, length 0.0905):
    the mean age of the averaged weights is a tenth of the steps. 0.9999 is reached at step 89,991.

    Args:
        rate: The largest decay.
    """
    return lambda step: 0.0 if step == 1 else min(rate, step / (9 + step))


def power_decay(length: float) -> Decay:
    """Return the decay of a power function average: (1 - 1/k)^(gamma + 1).

    The average weights step k by k^gamma, so its width is the same share of a run of any length
    (EDM2: Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models",
    section 3.1).

    Args:
        length: Standard deviation of this weighting over time, as a share of the steps so far
            (sigma_rel); 0.05 and 0.10 in EDM2's published runs.
    """
    exponent = _gamma(length) + 1
    return lambda step: (1 - 1 / step) ** exponent


def _gamma(length: float) -> float:
    """Solve sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)) for the positive gamma."""
    inverse = length**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


class Ema:
    """A moving average (EMA) of the weights, which starts from the initial weights.

    After every step: ema = decay * ema + (1 - decay) * weight.

    Args:
        weights: The float32 tensors that the optimizer updates in place.
        rate: One decay for every step (0.9999 in U-ViT's published training), or a function of k.
    """

    def __init__(self, weights: Sequence[Tensor], rate: float | Decay) -> None:
        self.num_updates = 0
        self._decay: Decay = rate if callable(rate) else lambda _: rate
        self._weights = list(weights)
        self.tensors = [weight.detach().float().clone() for weight in weights]

    @torch.no_grad()
    def update(self) -> None:
        """Update the average with the current weights; call once after each step."""
        self.num_updates += 1
        current = [weight.detach().float() for weight in self._weights]
        torch._foreach_lerp_(self.tensors, current, 1.0 - self._decay(self.num_updates))
