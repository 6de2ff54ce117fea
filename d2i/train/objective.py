"""The loss of each sample of a micro batch, as the network's family computes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from d2i.config import TrainConfig
from d2i.models.base import Family
from d2i.models.image_codec import VaeNumbers
from d2i.train.data.batch import Batch

Objective = Callable[[Any, Batch], Tensor]
"""From a network and a micro batch of B samples to the loss of each, (B,)."""


def build_objective(family: Family, vae: VaeNumbers, config: TrainConfig) -> Objective:
    """Return a function from (network, batch) to losses (B,); training takes their mean.

    The latents are drawn from the stored moments again at every step, or are their mean, as
    `train.latents` says (docs/models.md, Images and latents).

    Args:
        family: The family of the network.
        vae: The numbers that normalise its latents, `family.vae_numbers(network)`.
        config: The options of its loss.
    """
    options = family.loss_options(config)

    def objective(network: Any, batch: Batch) -> Tensor:
        if config.latents == "mean":
            raw = family.codec.mean(batch.image).to(batch.noise.dtype)
        else:
            raw = family.codec.raw(batch.image, batch.latent_noise)
        conditions = batch.conditions
        return family.losses(network, vae, raw, batch.noise, batch.draw, conditions, **options)

    return objective
