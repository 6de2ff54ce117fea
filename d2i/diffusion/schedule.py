"""The noise schedule of Stable Diffusion, in float64, at model times n = 1..1000.

Holds the tables that every loss and sampler reads. Knows no network.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from d2i.config import NUM_NOISE_LEVELS

BETA_FIRST = 0.00085
BETA_LAST = 0.012

Array = npt.NDArray[np.float64]


class Schedule:
    """Variance-preserving schedule, by default that of Stable Diffusion.

    x_n = sqrt(cum_alphas[n]) x_0 + sqrt(1 - cum_alphas[n]) eps; n = 0 is the clean sample.

    Args:
        betas: (1000,) variance that each level adds; None for square-root-linear ones, from 0.00085
            to 0.012.

    Attributes:
        num_levels: 1000, the largest n.
        betas: (1000,) float64; betas[i] belongs to n = i + 1.
        alphas: (1001,) float64, 1 - beta by n; alphas[0] is 1.
        cum_alphas: (1001,) float64, product of the alphas up to n; cum_alphas[0] is 1.
        cum_betas: (1001,) float64, the variance of the noise at n, 1 - cum_alphas.
        snr: (1001,) float64, cum_alphas / cum_betas; snr[0] is infinite.
    """

    def __init__(self, betas: Array | None = None) -> None:
        """Compute the tables."""
        first, last = math.sqrt(BETA_FIRST), math.sqrt(BETA_LAST)
        default: Array = np.linspace(first, last, NUM_NOISE_LEVELS, dtype=np.float64) ** 2
        self.num_levels = NUM_NOISE_LEVELS
        self.betas = default if betas is None else betas
        self.alphas: Array = np.concatenate([np.ones(1), 1.0 - self.betas])
        self.cum_alphas: Array = np.cumprod(self.alphas, dtype=np.float64)
        self.cum_betas: Array = 1.0 - self.cum_alphas
        with np.errstate(divide="ignore"):
            self.snr: Array = self.cum_alphas / self.cum_betas
        self._log_alphas: Array = 0.5 * np.cumsum(np.log(self.alphas[1:]))
        self._roots_by_device: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def log_alpha(self, n: float) -> float:
        """Return ln sqrt(abar) at a real n, interpolated linearly, constant outside 1..1000."""
        return float(np.interp(n, np.arange(1, self.num_levels + 1), self._log_alphas))

    def add_noise(self, x0: Tensor, eps: Tensor, n: Tensor) -> Tensor:
        """Add noise to clean samples, up to their model times.

        Args:
            x0: (B, ...) clean samples.
            eps: noise, shaped as `x0`.
            n: (B,) integers in 0..1000.

        Returns:
            sqrt(abar_n) x0 + sqrt(1 - abar_n) eps, in the dtype of `x0`.
        """
        signal, noise = (root[n].to(x0.dtype) for root in self._roots(x0.device))
        shape = (-1,) + (1,) * (x0.dim() - 1)
        return signal.view(shape) * x0 + noise.view(shape) * eps

    def min_snr_weights(self, n: Tensor, largest: float) -> Tensor:
        """Return the loss weights of Min-SNR (Hang et al. 2023, section 3.4) for predicted noise.

        Args:
            n: (B,) integers in 1..1000.
            largest: the signal-to-noise ratio from which on all levels weigh the same (gamma).

        Returns:
            min(snr_n, largest) / snr_n, (B,) float32; 1 where the ratio is 0.
        """
        snr = np.maximum(self.snr[1:], np.finfo(np.float64).tiny)
        weights = np.minimum(snr, largest) / snr
        return torch.from_numpy(weights).to(n.device)[n - 1].float()

    def _roots(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the square roots of `cum_alphas` and `cum_betas`, copied to a device once."""
        if device not in self._roots_by_device:
            self._roots_by_device[device] = (
                torch.from_numpy(np.sqrt(self.cum_alphas)).to(device),
                torch.from_numpy(np.sqrt(self.cum_betas)).to(device),
            )
        return self._roots_by_device[device]


@cache
def default_schedule() -> Schedule:
    """Return the schedule of the published networks, one shared object."""
    return Schedule()
