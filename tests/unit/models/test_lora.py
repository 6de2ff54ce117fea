"""A LoRA that does not fit the network or the backbone is refused in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from d2i.config import apply_settings
from d2i.errors import ConfigError
from d2i.models.model_dir import build_network
from d2i.recipes import load_recipe
from d2i.train.network import build_trained_network
from tests.integration.pipelines import save_tiny_sd15


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "base"
    save_tiny_sd15(directory)
    return directory


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ('adapter.targets=["nope"]', "adapter.targets is nope: Target modules"),
        ('adapter.targets=["norm1"]', "adapter.targets is norm1: Target module GroupNorm"),
        ('adapter.targets=["to_q", "nope"]', "no layer of the network is named nope"),
    ],
)
def test_unsupported_target_is_refused(base: Path, setting: str, said: str) -> None:
    settings = [f"backbone.weights={base}", setting]
    recipe = apply_settings(load_recipe("sd15-lora-photochat"), settings)
    with pytest.raises(ConfigError) as caught:
        build_trained_network(recipe)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "setting", "said"),
    [
        ("sd15-lora-photochat", "backbone.dim=64", "sizes of sd15 stand in its own directory"),
        ("sd15-lora-photochat", "backbone.weights=scratch", "fine-tuned, not trained from random"),
        ("sd15-lora-photochat", "sample.sampler=dpm_solver", "by diffusers' own pipeline"),
        ("sd15-lora-photochat", "train.weighting=cosmap", "train.weighting is 'cosmap'"),
        ("sd15-lora-photochat", "train.optim.name=adafactor", "OptimConfig has no field 'name'"),
        ("uvit-s-photochat", "adapter.kind=lora", "uvit-s takes no adapter; expected one of sd15"),
        ("uvit-s-photochat", "sample.sampler=pipeline", "uvit-s is no pipeline of diffusers"),
        ("unidiffuser-v1-photochat", "train.weighting=min_snr_5", "losses have no weighting"),
    ],
)
def test_setting_that_does_not_fit_backbone_is_refused(name: str, setting: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        apply_settings(load_recipe(name), [setting])
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_only_adapter_is_trained_in_float32(base: Path, precision: str) -> None:
    settings = [f"backbone.weights={base}", f"train.precision={precision}"]
    recipe = apply_settings(load_recipe("sd15-lora-photochat"), settings)
    network = build_trained_network(recipe)
    trained = {name for name, p in network.named_parameters() if p.requires_grad}
    assert trained
    assert all(".lora_" in name for name in trained)
    frozen = torch.float32 if precision == "fp32" else torch.bfloat16
    for name, parameter in network.named_parameters():
        assert parameter.dtype == (torch.float32 if name in trained else frozen)


def test_base_model_is_that_of_recipe(base: Path) -> None:
    """Its own autoencoder and text encoder prepare the data, unless the recipe says otherwise."""
    recipe = apply_settings(load_recipe("sd15-photochat"), [f"backbone.weights={base}"])
    assert recipe.encoders.vae == f"{base}/vae"
    assert recipe.encoders.clip_text == f"{base}/text_encoder"
    other = apply_settings(recipe, ["encoders.clip_text=openai/clip-vit-large-patch14"])
    assert other.encoders.clip_text == "openai/clip-vit-large-patch14"
    assert build_network(recipe.backbone).num_text_tokens == 77
