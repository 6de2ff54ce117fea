"""Training losses: mean squared error of the predicted noise, one number per sample.

Noise and model times are arguments: nothing here draws a random number. Knows no network class,
only what a network's call returns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from d2i.backbones import NOISE_WEIGHTINGS
from d2i.config import Weighting
from d2i.diffusion.schedule import Schedule, default_schedule
from d2i.errors import ConfigError

Given = TypeVar("Given")

LOGVAR_MIN = -30.0
LOGVAR_MAX = 20.0


def sample_latent(moments: Tensor, noise: Tensor, scale: float) -> Tensor:
    """Compute scaled latents from stored VAE moments and noise.

    Args:
        moments: (B, 2C, h, w) unscaled: C channels of mean, C of log-variance.
        noise: (B, C, h, w) standard normal; its dtype is the dtype of the arithmetic.
        scale: latent scale of the network, `network.latent_scale`.

    Returns:
        scale * (mean + exp(logvar / 2) * noise), (B, C, h, w), log-variance clamped to -30..20.
    """
    mean, logvar = moments.to(noise.dtype).chunk(2, dim=1)  # each (B, C, h, w)
    deviation = torch.exp(0.5 * logvar.clamp(LOGVAR_MIN, LOGVAR_MAX))
    return scale * (mean + deviation * noise)


def noise_prediction_loss(
    network: Callable[[Tensor, Tensor, Given], Tensor],
    latent: Tensor,
    conditions: Given,
    n: Tensor,
    noise: Tensor,
    schedule: Schedule | None = None,
    weighting: Weighting = "none",
) -> Tensor:
    """Return the noise-prediction loss (Ho et al. 2020, equation 14), as U-ViT is trained with it.

    Args:
        network: called as `network(latent, n, conditions)`.
        latent: (B, 4, h, w) clean, scaled latents.
        conditions: passed on, such as text features (B, T, D), those of '' where dropped.
        n: (B,) integers in 1..1000.
        noise: standard normal, shaped as `latent`.
        schedule: noise schedule; default that of the published networks.
        weighting: weight of each noise level: `none` for 1, or `min_snr_5` (Min-SNR, gamma 5).

    Returns:
        (B,) mean squared error over channels and pixels; the batch loss is its mean.

    Raises:
        ConfigError: no such weighting for networks that predict noise.
    """
    if weighting not in NOISE_WEIGHTINGS:
        raise ConfigError(
            f"weighting is {weighting!r}, expected one of {', '.join(NOISE_WEIGHTINGS)} for a "
            "network that predicts noise"
        )
    schedule = schedule or default_schedule()
    noised = schedule.add_noise(latent, noise, n)  # (B, 4, h, w)
    losses = (network(noised, n, conditions) - noise).square().flatten(1).mean(1)  # (B,)
    return losses if weighting == "none" else losses * schedule.min_snr_weights(n, 5.0)
