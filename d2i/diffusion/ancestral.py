"""Ancestral (DDPM) sampling: Algorithm 2 of Ho et al. (2020), all 1000 steps.

The noise is an argument: nothing here draws a random number. Knows no network.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from d2i.diffusion.dpm_solver import Eps, time_batch
from d2i.diffusion.schedule import Schedule, default_schedule
from d2i.errors import ConfigError

Variance = Literal["beta", "posterior"]


def ancestral(
    eps: Eps,
    x: Tensor,
    noise: Tensor | Sequence[Tensor],
    variance: Variance = "beta",
    schedule: Schedule | None = None,
) -> Tensor:
    """Sample with all steps of the reverse process, from n = 1000 to a clean sample.

    x <- (x - beta_n / sqrt(1 - abar_n) eps(x, n)) / sqrt(1 - beta_n) + sigma_n z

    Args:
        eps: noise prediction `eps(x, n)`, as for `dpm_solver`.
        x: (B, ...) standard normal noise, the state at n = 1000.
        noise: z by step, each shaped as `x`; noise[i] belongs to n = 1000 - i. Any object
            indexed by i works. n = 1 adds no noise, so noise[999] is never read.
        variance: sigma_n^2: `beta` for beta_n, `posterior` for the variance of the posterior,
            beta_n (1 - abar_{n-1}) / (1 - abar_n).
        schedule: noise schedule; default that of the published networks.

    Returns:
        Samples shaped and typed as `x`.

    Raises:
        ConfigError: `variance` is neither of the two.
    """
    if variance not in ("beta", "posterior"):
        raise ConfigError(f"variance is {variance!r}, expected 'beta' or 'posterior'")
    schedule = schedule or default_schedule()
    for n in range(schedule.num_levels, 0, -1):
        x = _mean(eps, x, n, schedule)
        if n > 1:
            deviation = math.sqrt(_variance(schedule, n, variance))
            x = x + deviation * torch.as_tensor(noise[schedule.num_levels - n]).to(x)
    return x


def _mean(eps: Eps, x: Tensor, n: int, schedule: Schedule) -> Tensor:
    beta = float(schedule.betas[n - 1])
    factor = beta / math.sqrt(schedule.cum_betas[n])
    return (x - factor * eps(x, time_batch(x, n)).to(x.dtype)) / math.sqrt(1.0 - beta)


def _variance(schedule: Schedule, n: int, variance: Variance) -> float:
    beta = float(schedule.betas[n - 1])
    if variance == "beta":
        return beta
    return beta * float(schedule.cum_betas[n - 1] / schedule.cum_betas[n])
