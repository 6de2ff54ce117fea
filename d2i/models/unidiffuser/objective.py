"""The training loss of UniDiffuser: one number per sample.

Noise and model times are arguments: nothing here draws a random number. Knows no network class,
only what a network's call returns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from d2i.diffusion.schedule import Schedule, default_schedule
from d2i.errors import ConfigError


def unidiffuser_loss(
    network: Callable[..., tuple[Tensor, Tensor, Tensor]],
    parts: Sequence[Tensor],
    n_image: Tensor,
    n_text: Tensor,
    noises: Sequence[Tensor],
    *,
    kind: Literal["joint", "t2i"] = "joint",
    weights: Sequence[float] | None = None,
    data_type: int | Tensor = 1,
    schedule: Schedule | None = None,
) -> Tensor:
    """Return the noise-prediction loss of UniDiffuser (its paper's equation 1 and Algorithm 1).

    Args:
        network: called as `network(latent, clip_image, text, n_image, n_text, data_type)`.
        parts: clean latent (B, 4, h, w), scaled; clip_image (B, 1, C); text (B, T, D).
        n_image: (B,) integers in 1..1000, shared by latent and CLIP image.
        n_text: (B,) integers in 1..1000; not used by `t2i`.
        noises: standard normal for each of `parts`; `t2i` uses the first two.
        kind: `joint` adds noise to all parts and predicts it; `t2i` leaves the text clean
            (time 0) and predicts the noise of latent and CLIP image only.
        weights: None for the mean over all predicted numbers together, else one weight per
            predicted part (latent, clip, and text for `joint`), for a weighted sum of the parts'
            means.
        data_type: see `UniDiffuser.forward`.
        schedule: noise schedule; default that of the published networks.

    Returns:
        (B,) loss per sample; the batch loss is its mean.

    Raises:
        ConfigError: `kind` is neither of the two.
    """
    if kind not in ("joint", "t2i"):
        raise ConfigError(f"kind is {kind!r}, expected 'joint' or 't2i'")
    schedule = schedule or default_schedule()
    latent, clip_image, text = parts
    noised_latent = schedule.add_noise(latent, noises[0], n_image)
    noised_clip = schedule.add_noise(clip_image, noises[1], n_image)
    if kind == "t2i":
        n_text, given_text = torch.zeros_like(n_image), text
    else:
        given_text = schedule.add_noise(text, noises[2], n_text)
    predicted = network(noised_latent, noised_clip, given_text, n_image, n_text, data_type)
    num_parts = 2 if kind == "t2i" else 3
    errors = [
        (part - noise).square().flatten(1)  # (B, numbers of the part)
        for part, noise in zip(predicted[:num_parts], noises[:num_parts], strict=True)
    ]
    if weights is None:
        return torch.cat(errors, dim=1).mean(1)
    weighted = [w * error.mean(1) for w, error in zip(weights, errors, strict=True)]
    return torch.stack(weighted).sum(0)
