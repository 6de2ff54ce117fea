"""Training minimizes the UniDiffuser loss that the recipe sets."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from d2i.config import TrainConfig, UniDiffuserLossConfig, load_config
from d2i.diffusion import sample_latent
from d2i.errors import ConfigError
from d2i.models import build_backbone, family
from d2i.models.unidiffuser.objective import unidiffuser_loss
from d2i.train.data.batch import Batch
from d2i.train.objective import Objective, build_objective

SIZES: dict[str, Any] = {"latent_size": 4, "dim": 16, "depth": 2, "num_heads": 2, "text_dim": 8}
SIZES |= {"num_text_tokens": 3, "clip_dim": 6}


def random_batch() -> Batch:
    """Return a batch of two."""
    torch.manual_seed(0)
    conditions = {
        "text": torch.randn(2, 3, 8),
        "clip": torch.randn(2, 1, 6),
        "clip_noise": torch.randn(2, 1, 6),
        "text_noise": torch.randn(2, 3, 8),
        "n_text": torch.tensor([1, 900]),
    }
    return Batch(
        keys=("a", "b"),
        image=torch.randn(2, 8, 4, 4),
        latent_noise=torch.randn(2, 4, 4, 4),
        noise=torch.randn(2, 4, 4, 4),
        draw=torch.tensor([499, 19]),
        conditions=conditions,
    )


def objective(options: UniDiffuserLossConfig) -> Objective:
    config = TrainConfig(num_steps=1, global_batch_size=2, micro_batch_size=2, unidiffuser=options)
    return build_objective(family("unidiffuser"), {"scaling_factor": 0.5}, config)


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
    found = objective(config)(network, batch)
    given = batch.conditions
    expected = unidiffuser_loss(
        network,
        [sample_latent(batch.image, batch.latent_noise, 0.5), given["clip"], given["text"]],
        batch.draw + 1,
        given["n_text"],
        [batch.noise, given["clip_noise"], given["text_noise"]],
        kind=config.loss,
        weights=config.weights,
        data_type=config.data_type,
    )
    assert torch.equal(found, expected)
    plain = objective(UniDiffuserLossConfig())(network, batch)
    assert bool(options) == bool((found != plain).any())


@pytest.mark.parametrize("options", [{"weights": [1, 1]}, {"loss": "t2i", "weights": [1, 1, 1]}])
def test_wrong_number_of_loss_weights_is_one_line_error(options: dict[str, Any]) -> None:
    values = {"num_steps": 1, "global_batch_size": 1, "micro_batch_size": 1}
    with pytest.raises(ConfigError, match="parts, got"):
        load_config(TrainConfig, values | {"unidiffuser": options}, source="here")
