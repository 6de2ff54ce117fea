"""Flow matching: straight paths from images to noise, their noise levels and their loss.

A noised sample is (1 - sigma) x0 + sigma noise, and a network predicts its velocity, noise - x0
(Esser et al. 2024, "Scaling Rectified Flow Transformers", equations 12 to 14). As the published
training scripts do, u in 0..1 picks a row of a scheduler's descending table of 1000 levels: u near
0 is almost pure noise. Knows no network.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from d2i.backbones import FLOW_WEIGHTINGS
from d2i.config import NUM_NOISE_LEVELS, Weighting
from d2i.errors import ConfigError


class FlowSchedule:
    """The noise levels of training, in descending order.

    Attributes:
        sigmas: (1000,) float32, the share of noise.
        timesteps: (1000,) float32, sigmas times 1000: what networks are given.
    """

    def __init__(self, sigmas: Tensor, timesteps: Tensor) -> None:
        self.sigmas, self.timesteps = sigmas.float(), timesteps.float()

    def rows(self, u: Tensor) -> Tensor:
        """Return the rows (B,) int64 that u (B,) in 0..1 picks."""
        return (u * NUM_NOISE_LEVELS).long().clamp(max=NUM_NOISE_LEVELS - 1)


def published_schedule(config: Any) -> FlowSchedule:
    """Return the levels that the published scripts train on, by a scheduler's config.

    A static shift is applied; a dynamic one, which acts in sampling alone, is not.

    Args:
        config: Of any of diffusers' schedulers; read as FlowMatchEulerDiscreteScheduler's.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    # A network may be built on the meta device meanwhile, which holds no numbers.
    with torch.device("cpu"):
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
    return FlowSchedule(scheduler.sigmas[:NUM_NOISE_LEVELS], scheduler.timesteps)


def shifted_schedule(shift: float) -> FlowSchedule:
    """Return 1000 levels with a shift, s sigma / (1 + (s - 1) sigma); see `published_schedule`."""
    return published_schedule({"num_train_timesteps": NUM_NOISE_LEVELS, "shift": shift})


def resolution_shift(num_tokens: int) -> float:
    """Return the shift of FLUX for a number of image tokens: exp(0.5) at 256, exp(1.15) at 4096.

    In between it is linear in the exponent, as `calculate_shift` of diffusers' pipelines.
    """
    slope = (1.15 - 0.5) / (4096 - 256)
    return math.exp(0.5 + slope * (num_tokens - 256))


def flow_loss(
    predict: Callable[[Tensor, Tensor], Tensor],
    latent: Tensor,
    noise: Tensor,
    u: Tensor,
    schedule: FlowSchedule,
    weighting: Weighting = "none",
) -> Tensor:
    """Return the flow-matching loss of each sample, (B,); the batch loss is its mean.

    Args:
        predict: Called as `predict(noised, timestep)`: the velocity, shaped as `latent`.
        latent: (B, C, h, w) clean, normalised latents.
        noise: Standard normal, shaped as `latent`.
        u: (B,) in 0..1.
        schedule: The noise levels.
        weighting: Of each level: `none` for 1, or `sigma_sqrt` or `cosmap` (Esser et al. 2024,
            section 3.1).

    Raises:
        ConfigError: If there is no such weighting for flow matching.
    """
    if weighting not in FLOW_WEIGHTINGS:
        raise ConfigError(
            f"weighting is {weighting!r}, expected one of {', '.join(FLOW_WEIGHTINGS)} for a "
            "network that predicts velocities"
        )
    rows = schedule.rows(u).to(schedule.sigmas.device)
    sigma = schedule.sigmas[rows].to(latent)  # (B,)
    timestep = schedule.timesteps[rows].to(latent)
    wide = sigma.view(-1, *[1] * (latent.dim() - 1))
    predicted = predict((1.0 - wide) * latent + wide * noise, timestep)
    losses = (predicted.float() - (noise - latent)).square().flatten(1).mean(1)  # (B,)
    return losses * _weights(sigma, weighting)


def _weights(sigma: Tensor, weighting: Weighting) -> Tensor:
    if weighting == "sigma_sqrt":
        return sigma**-2.0
    if weighting == "cosmap":
        return 2.0 / (math.pi * (1.0 - 2.0 * sigma + 2.0 * sigma**2))
    return torch.ones_like(sigma)
