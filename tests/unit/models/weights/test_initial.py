"""The record of the initial weights of a run."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

from d2i.config import BackboneConfig
from d2i.errors import ConfigError
from d2i.eval.systems import parse_system
from d2i.models import build_backbone, save_weights
from d2i.models.model_dir import build_network
from d2i.models.weights.initial import describe_initial_weights, is_initialisation
from d2i.recipes import load_recipe

TINY = {"latent_size": 4, "dim": 16, "depth": 3, "num_heads": 2, "text_dim": 8}


def perturbed(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the weights with every value changed, as after a training step."""
    return {key: value + 0.01 * torch.randn_like(value) for key, value in _state(network).items()}


def _state(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    return dict(network.state_dict())


@pytest.mark.parametrize("name", ["uvit-s", "unidiffuser-v1"])
def test_is_initialisation_separates_random_from_trained_weights(name: str) -> None:
    network = build_backbone(name, **TINY)
    assert is_initialisation(_state(network))
    assert not is_initialisation(perturbed(network))


def test_initial_weights_file_is_named_hashed_and_counted(tmp_path: Path) -> None:
    state = perturbed(build_backbone("uvit-s", **TINY))
    path = tmp_path / "nnet.safetensors"
    save_weights(state, path)
    assert describe_initial_weights(BackboneConfig(name="uvit-s", weights=str(path))) == {
        "file": "nnet.safetensors",
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "keys": len(state),
        "layout": [],
        "initialisation": False,
    }


def test_published_shapes_name_published_weights_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.safetensors"
    save_weights(_state(build_backbone("uvit-s")), path)
    found = describe_initial_weights(BackboneConfig(name="uvit-s", weights=str(path)))
    assert found["layout"] == ["mscoco_uvit_small.pth"]
    assert found["initialisation"]


def test_scratch_weights_are_recorded_as_scratch() -> None:
    config = BackboneConfig(name="uvit-s", weights="scratch", **TINY)
    assert describe_initial_weights(config) == {"file": "scratch"}
    assert is_initialisation(_state(build_network(config)))


def test_parse_system_without_weights_names_published_file() -> None:
    with pytest.raises(ConfigError, match=r"expected uvit_v1\.pth \(model hub, thu-ml/"):
        parse_system("unidiffuser-v1", None, load_recipe("unidiffuser-v1-photochat"))
