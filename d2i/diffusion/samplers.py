"""The samplers by their names in a recipe, each with the noise that it adds at every step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from d2i.config import NUM_NOISE_LEVELS
from d2i.diffusion.ancestral import Variance, ancestral
from d2i.diffusion.dpm_solver import Eps, dpm_solver
from d2i.diffusion.draws import SampleDraws
from d2i.diffusion.schedulers import build_scheduler, run_scheduler

DIFFUSERS_PREFIX = "diffusers:"
ANCESTRAL: dict[str, Variance] = {"ancestral": "beta", "ancestral_posterior": "posterior"}


def check_sampler(name: str) -> None:
    """Check that a sampler of this name exists, before anything is loaded for it.

    Raises:
        ConfigError: as `build_scheduler`.
    """
    if name.startswith(DIFFUSERS_PREFIX):
        build_scheduler(name.removeprefix(DIFFUSERS_PREFIX))


def run_sampler(name: str, eps: Eps, x: Tensor, num_steps: int, draws: SampleDraws) -> Tensor:
    """Sample from pure noise.

    Args:
        name: `dpm_solver` (as published), `ancestral` or `ancestral_posterior` (Algorithm 2 of the
            paper with either variance, always all 1000 steps), or `diffusers:` and a scheduler.
        eps: noise prediction `eps(x, n)`, as for `dpm_solver`.
        x: (B, ...) standard normal noise, the state at n = 1000.
        num_steps: the number of steps; ignored by the two ancestral samplers.
        draws: the source of each sample's own noise.

    Returns:
        Samples shaped and typed as `x`.

    Raises:
        ConfigError: as `dpm_solver` and `run_scheduler`.
    """
    if name in ANCESTRAL:
        return ancestral(eps, x, _StepNoise(draws, x), ANCESTRAL[name])
    if name.startswith(DIFFUSERS_PREFIX):
        seeds = draws.generator_seeds("sample.step")
        return run_scheduler(eps, x, num_steps, name.removeprefix(DIFFUSERS_PREFIX), seeds)
    return dpm_solver(eps, x, num_steps)


class _StepNoise(Sequence[Tensor]):
    """The noise of all 1000 steps, drawn lazily, one step at a time."""

    def __init__(self, draws: SampleDraws, like: Tensor) -> None:
        self._draws, self._like = draws, like

    def __len__(self) -> int:
        return NUM_NOISE_LEVELS

    def __getitem__(self, step: int) -> Tensor:  # type: ignore[override]
        drawn = self._draws.normal("sample.step", tuple(self._like.shape[1:]), step)
        return torch.from_numpy(drawn).to(self._like)
