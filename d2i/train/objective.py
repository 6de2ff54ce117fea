"""The loss of each sample of a micro batch, by backbone family."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from d2i.config import BackboneConfig, UniDiffuserLossConfig
from d2i.diffusion import sample_latent, unidiffuser_loss, uvit_loss
from d2i.train.data.batch import Batch

Objective = Callable[[Any, Batch], Tensor]
"""From a network and a micro batch of B samples to the loss of each, (B,)."""


def build_objective(
    config: BackboneConfig, latent_scale: float, options: UniDiffuserLossConfig
) -> Objective:
    """Return a function from (network, batch) to losses (B,); training takes their mean.

    The latents are drawn from the stored moments again at every step
    (docs/models.md, Images and latents).
    """

    def latents(batch: Batch) -> Tensor:
        return sample_latent(batch.moments, batch.latent_noise, latent_scale)

    def uvit(network: Any, batch: Batch) -> Tensor:
        return uvit_loss(network, latents(batch), batch.text, batch.n, batch.noise)

    def unidiffuser(network: Any, batch: Batch) -> Tensor:
        joint = batch.joint
        if joint is None:
            raise ValueError("a joint loss needs a joint batch")
        parts = (latents(batch), joint.clip, batch.text)
        noises = (batch.noise, joint.clip_noise, joint.text_noise)
        return unidiffuser_loss(
            network,
            parts,
            batch.n,
            joint.n_text,
            noises,
            kind=options.loss,
            weights=options.weights,
            data_type=options.data_type,
        )

    return unidiffuser if config.is_joint else uvit
