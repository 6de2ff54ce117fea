"""Training minimizes the UniDiffuser loss that the recipe sets."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from d2i.config import BackboneConfig, TrainConfig, UniDiffuserLossConfig, load_config
from d2i.diffusion import sample_latent, unidiffuser_loss
from d2i.errors import ConfigError
from d2i.models import build_backbone
from d2i.train.data.batch import Batch, JointInputs
from d2i.train.objective import build_objective

SIZES: dict[str, Any] = {"latent_size": 4, "dim": 16, "depth": 2, "num_heads": 2, "text_dim": 8}
SIZES |= {"num_text_tokens": 3, "clip_dim": 6}


def random_batch() -> Batch:
    """Return a batch of two."""
    torch.manual_seed(0)
    joint = JointInputs(
        clip=torch.randn(2, 1, 6),
        clip_noise=torch.randn(2, 1, 6),
        text_noise=torch.randn(2, 3, 8),
        n_text=torch.tensor([1, 900]),
    )
    return Batch(
        keys=("a", "b"),
        moments=torch.randn(2, 8, 4, 4),
        text=torch.randn(2, 3, 8),
        latent_noise=torch.randn(2, 4, 4, 4),
        noise=torch.randn(2, 4, 4, 4),
        n=torch.tensor([500, 20]),
        joint=joint,
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"loss": "t2i"},
        {"data_type": 0},
        {"weights": (1.0, 0.5, 0.0)},
        {"loss": "t2i", "weights": (1.0, 2.0), "data_type": 0},
    ],
)
def test_objective_computes_unidiffuser_loss_of_recipe(options: dict[str, Any]) -> None:
    torch.manual_seed(1)
    network, batch = build_backbone("unidiffuser-v1", **SIZES), random_batch()
    config = UniDiffuserLossConfig(**options)
    backbone = BackboneConfig(name="unidiffuser-v1")
    found = build_objective(backbone, 0.5, config)(network, batch)
    assert batch.joint is not None
    expected = unidiffuser_loss(
        network,
        [sample_latent(batch.moments, batch.latent_noise, 0.5), batch.joint.clip, batch.text],
        batch.n,
        batch.joint.n_text,
        [batch.noise, batch.joint.clip_noise, batch.joint.text_noise],
        kind=config.loss,
        weights=config.weights,
        data_type=config.data_type,
    )
    assert torch.equal(found, expected)
    plain = build_objective(backbone, 0.5, UniDiffuserLossConfig())(network, batch)
    assert bool(options) == bool((found != plain).any())


@pytest.mark.parametrize("options", [{"weights": [1, 1]}, {"loss": "t2i", "weights": [1, 1, 1]}])
def test_wrong_number_of_loss_weights_is_one_line_error(options: dict[str, Any]) -> None:
    values = {"num_steps": 1, "global_batch_size": 1, "micro_batch_size": 1}
    with pytest.raises(ConfigError, match="parts, got"):
        load_config(TrainConfig, values | {"unidiffuser": options}, source="here")
