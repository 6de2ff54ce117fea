"""The samplers by their names in a recipe, each with the noise that it adds at every step.

Ancestral sampling is here too: Algorithm 2 of Ho et al. (2020), all 1000 steps. Its noise is an
argument.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import count
from typing import Literal

import torch
from torch import Tensor

from d2i.config import NUM_NOISE_LEVELS
from d2i.diffusion.dpm_solver import Eps, OnStep, clean_samples, dpm_solver, time_batch
from d2i.diffusion.draws import SampleDraws
from d2i.diffusion.schedule import Schedule, default_schedule
from d2i.diffusion.schedulers import build_scheduler, run_scheduler
from d2i.errors import ConfigError

DIFFUSERS_PREFIX = "diffusers:"
ANCESTRAL: dict[str, Variance] = {"ancestral": "beta", "ancestral_posterior": "posterior"}
Variance = Literal["beta", "posterior"]


def check_sampler(name: str) -> None:
    """Check that a sampler of this name exists, before anything is loaded for it.

    Raises:
        ConfigError: as `build_scheduler`.
    """
    if name.startswith(DIFFUSERS_PREFIX):
        build_scheduler(name.removeprefix(DIFFUSERS_PREFIX))


def run_sampler(
    name: str,
    eps: Eps,
    x: Tensor,
    num_steps: int,
    draws: SampleDraws,
    on_step: OnStep | None = None,
) -> Tensor:
    """Sample from pure noise.

    Args:
        name: `dpm_solver` (as published), `ancestral` or `ancestral_posterior` (Algorithm 2 of the
            paper with either variance, always all 1000 steps), or `diffusers:` and a scheduler.
        eps: noise prediction `eps(x, n)`, as for `dpm_solver`.
        x: (B, ...) standard normal noise, the state at n = 1000.
        num_steps: the number of steps; ignored by the two ancestral samplers.
        draws: the source of each sample's own noise.
        on_step: called after each evaluation of `eps` with its number, from 1, and the clean
            samples that it predicts, shaped as `x`. Some schedulers evaluate twice in a step.

    Returns:
        Samples shaped and typed as `x`.

    Raises:
        ConfigError: as `dpm_solver` and `run_scheduler`.
    """
    if on_step:
        eps = _watched(eps, on_step)
    if name in ANCESTRAL:
        return ancestral(eps, x, _StepNoise(draws, x), ANCESTRAL[name])
    if name.startswith(DIFFUSERS_PREFIX):
        seeds = draws.generator_seeds(".step")
        return run_scheduler(eps, x, num_steps, name.removeprefix(DIFFUSERS_PREFIX), seeds)
    return dpm_solver(eps, x, num_steps)


def _watched(eps: Eps, on_step: OnStep) -> Eps:
    """Return the same prediction, which tells `on_step` of each evaluation."""
    numbers = count(1)

    def watched(x: Tensor, n: Tensor) -> Tensor:
        predicted = eps(x, n)
        on_step(next(numbers), clean_samples(predicted, x, float(n[0])))
        return predicted

    return watched


def draw_noise(
    draws: SampleDraws, part: str, shape: Sequence[int], device: torch.device, call: int = 0
) -> Tensor:
    """Draw standard normal noise as a float32 tensor (B, *shape); see `SampleDraws.normal`."""
    return torch.from_numpy(draws.normal(part, tuple(shape), call)).to(device)


class _StepNoise(Sequence[Tensor]):
    """The noise of all 1000 steps, drawn lazily, one step at a time."""

    def __init__(self, draws: SampleDraws, like: Tensor) -> None:
        self._draws, self._like = draws, like

    def __len__(self) -> int:
        return NUM_NOISE_LEVELS

    def __getitem__(self, step: int) -> Tensor:  # type: ignore[override]
        return draw_noise(self._draws, ".step", self._like.shape[1:], self._like.device, step)


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
