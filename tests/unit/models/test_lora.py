"""A LoRA that does not fit the network or the backbone is refused in one line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from d2i.config import apply_settings
from d2i.errors import ConfigError
from d2i.eval.systems import parse_system
from d2i.models.model_dir import build_network
from d2i.recipes import load_recipe
from d2i.train.network import build_trained_network
from tests.integration.pipelines import save_tiny_sd15, save_tiny_sdxl


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
        ("sd15-lora-photochat", "text.num_windows=2", "sd15 reads one window; expected 1"),
        (
            "sd15-lora-photochat",
            "train.weighting=cosmap",
            "expected one of none, min_snr_5 for sd15",
        ),
        ("uvit-s-photochat", "adapter.kind=lora", "uvit-s takes no adapter; expected one of sd15"),
        ("unidiffuser-v1-photochat", "train.weighting=min_snr_5", "losses have no weighting"),
    ],
)
def test_setting_that_does_not_fit_backbone_is_refused(name: str, setting: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        apply_settings(load_recipe(name), [setting])
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "sampler", "said"),
    [
        ("sd15", "dpm_solver", "by diffusers' own pipeline; expected pipeline"),
        ("sana", "diffusers:DDIMScheduler", "its flow scheduler; expected pipeline"),
        ("uvit-s", "pipeline", "uvit-s is no pipeline of diffusers"),
    ],
)
def test_sampler_of_another_kind_of_backbone_is_refused(
    tmp_path: Path, name: str, sampler: str, said: str
) -> None:
    """The recipe of the data, which an evaluation begins with, may be for another backbone."""
    recipe = apply_settings(load_recipe("demo"), [f"sample.sampler={sampler}"])
    with pytest.raises(ConfigError) as caught:
        parse_system(name, str(tmp_path), recipe)
    assert said in str(caught.value)
    assert "--set sample.sampler=" in str(caught.value)


FLOP = """
import sys
from d2i.config import BackboneConfig
from d2i.train.monitor.throughput import count_flops

for name, weights in zip(("sd15", "sdxl"), sys.argv[1:]):
    print(count_flops(BackboneConfig(name=name, weights=weights)))
"""


def test_flop_are_counted_of_network_without_memory(base: Path, tmp_path: Path) -> None:
    """In a process that has not used the meta device before."""
    save_tiny_sdxl(tmp_path / "sdxl")
    words = [sys.executable, "-W", "ignore", "-c", FLOP, str(base), str(tmp_path / "sdxl")]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert all(int(line) > 0 for line in done.stdout.split())


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
