"""DPM-Solver++ as the published samplers run it: singlestep, order 3, data prediction.

Lu et al., "DPM-Solver++" (2022); steps uniform in time from n = 1000 to n = 1, one network
evaluation per step. Every coefficient is computed in float64. Knows no network.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from d2i.diffusion.schedule import Schedule, default_schedule
from d2i.errors import ConfigError

Eps = Callable[[Tensor, Tensor], Tensor]
OnStep = Callable[[int, Tensor], None]
"""Called at each step of a sampler with its number, from 1, and the latents of the images.

An exception that it raises ends the sampler, and leaves the network as it was.
"""


@dataclass(frozen=True)
class Point:
    """One point of the time grid: x_n = alpha x_0 + sigma eps; lam is ln(alpha / sigma)."""

    n: float
    alpha: float
    sigma: float
    lam: float


def dpm_solver(eps: Eps, x: Tensor, num_steps: int, schedule: Schedule | None = None) -> Tensor:
    """Sample with DPM-Solver++ from pure noise.

    Args:
        eps: noise prediction `eps(x, n)`; n is a (B,) tensor of one real model time in
            1..1000, float64 if x is, else float32.
        x: (B, ...) standard normal noise, the state at n = 1000.
        num_steps: network evaluations, 1 or more; 50 as published.
        schedule: noise schedule; default that of the published networks.

    Returns:
        The state at n = 1 (as published, no last step to 0), shaped and typed as `x`.

    Raises:
        ConfigError: `num_steps` is below 1.
    """
    if num_steps < 1:
        raise ConfigError(f"num_steps is {num_steps}, expected 1 or more; the papers use 50")
    grid = _grid(schedule or default_schedule(), num_steps)
    start = 0
    for order in _orders(num_steps):
        x = _STEPS[order](eps, x, grid[start : start + order + 1])
        start += order
    return x


def _orders(num_steps: int) -> list[int]:
    """Return the order of each update; the orders add up to `num_steps`."""
    num_whole, rest = divmod(num_steps, 3)
    return [3] * (num_whole - 1) + [2, 1] if rest == 0 else [3] * num_whole + [rest]


def _grid(schedule: Schedule, num_steps: int) -> list[Point]:
    levels = schedule.num_levels
    times = levels * np.linspace(1.0, 1.0 / levels, num_steps + 1)
    return [_point(schedule, float(n)) for n in times]


def _point(schedule: Schedule, n: float) -> Point:
    log_alpha = schedule.log_alpha(n)
    sigma = math.sqrt(-math.expm1(2.0 * log_alpha))
    return Point(n, math.exp(log_alpha), sigma, log_alpha - math.log(sigma))


def time_batch(x: Tensor, n: float) -> Tensor:
    """Return a state's model time, (B,); at least float32, as bfloat16 rounds 999 to 1000."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return torch.full((x.shape[0],), n, dtype=dtype, device=x.device)


def clean_samples(
    predicted: Tensor, x: Tensor, n: float, schedule: Schedule | None = None
) -> Tensor:
    """Return the clean samples that a noise prediction implies, shaped and typed as `x`.

    Args:
        predicted: (B, ...) the noise predicted for `x`.
        x: (B, ...) the state at model time n.
        n: the model time, in 1..1000.
        schedule: noise schedule; default that of the published networks.
    """
    return _clean(predicted, x, _point(schedule or default_schedule(), n))


def _clean(predicted: Tensor, x: Tensor, at: Point) -> Tensor:
    return (x - at.sigma * predicted.to(x.dtype)) / at.alpha


def _predict_clean(eps: Eps, x: Tensor, at: Point) -> Tensor:
    return _clean(eps(x, time_batch(x, at.n)), x, at)


def _first_order(x: Tensor, clean: Tensor, start: Point, end: Point) -> Tensor:
    """Return the state at `end`; exact if `clean` does not change between the two points."""
    return (end.sigma / start.sigma) * x - end.alpha * math.expm1(start.lam - end.lam) * clean


def _step_1(eps: Eps, x: Tensor, grid: list[Point]) -> Tensor:
    return _first_order(x, _predict_clean(eps, x, grid[0]), grid[0], grid[1])


def _step_2(eps: Eps, x: Tensor, grid: list[Point]) -> Tensor:
    p0, p1, end = grid
    h = end.lam - p0.lam
    r1 = (p1.lam - p0.lam) / h
    clean_0 = _predict_clean(eps, x, p0)
    clean_1 = _predict_clean(eps, _first_order(x, clean_0, p0, p1), p1)
    slope = -end.alpha * math.expm1(-h) / (2.0 * r1)
    return _first_order(x, clean_0, p0, end) + slope * (clean_1 - clean_0)


def _step_3(eps: Eps, x: Tensor, grid: list[Point]) -> Tensor:
    p0, p1, p2, end = grid
    h = end.lam - p0.lam
    r1 = (p1.lam - p0.lam) / h
    r2 = (p2.lam - p0.lam) / h
    clean_0 = _predict_clean(eps, x, p0)
    change_1 = _predict_clean(eps, _first_order(x, clean_0, p0, p1), p1) - clean_0
    slope_1 = (r2 / r1) * p2.alpha * (math.expm1(-r2 * h) / (r2 * h) + 1.0)
    at_p2 = _first_order(x, clean_0, p0, p2) + slope_1 * change_1
    change_2 = _predict_clean(eps, at_p2, p2) - clean_0
    slope_2 = (end.alpha / r2) * (math.expm1(-h) / h + 1.0)
    return _first_order(x, clean_0, p0, end) + slope_2 * change_2


_STEPS = {1: _step_1, 2: _step_2, 3: _step_3}
