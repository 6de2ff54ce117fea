"""Noise levels of flow matching: drawn, shifted, and named by the technical reports."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from d2i.config import TrainConfig
from d2i.dialog import Turn
from d2i.diffusion.draws import BatchDraws
from d2i.diffusion.flow import FlowSchedule, flow_loss, resolution_shift, shifted_schedule
from d2i.errors import ConfigError
from d2i.models import family
from d2i.prompt_text import context_text
from d2i.recipes import load_recipe, resolve_recipe

CONFIG = TrainConfig(num_steps=1, global_batch_size=1, micro_batch_size=1)
REPORT = CONFIG.model_copy(update={"objective": "report"})


def test_shift_moves_levels_towards_noise() -> None:
    plain, shifted = shifted_schedule(1.0), shifted_schedule(3.0)
    torch.testing.assert_close(plain.sigmas, torch.linspace(1, 0.001, 1000))
    torch.testing.assert_close(shifted.sigmas, 3 * plain.sigmas / (1 + 2 * plain.sigmas))
    torch.testing.assert_close(shifted.timesteps, 1000 * shifted.sigmas)


def test_resolution_shift_is_that_of_flux() -> None:
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    for num_tokens in (256, 1024, 4096):
        assert resolution_shift(num_tokens) == pytest.approx(math.exp(calculate_shift(num_tokens)))
    one = family("z-image")
    report = one.report_schedule(torch.zeros(1, 16, 64, 64))  # type: ignore[attr-defined]
    torch.testing.assert_close(report.sigmas, shifted_schedule(resolution_shift(1024)).sigmas)


def test_report_draws_logit_normal_levels_and_script_uniform_ones() -> None:
    draws = BatchDraws(0, [str(number) for number in range(4000)], 7)
    one = family("sana")
    uniform, middle = (one.draw_levels(draws, config) for config in (CONFIG, REPORT))
    assert uniform.dtype == middle.dtype == np.float32
    quartiles = np.quantile(uniform, [0.25, 0.5, 0.75])
    np.testing.assert_allclose(quartiles, [0.25, 0.5, 0.75], atol=0.03)
    z = np.log(middle / (1 - middle))
    assert abs(float(z.mean())) < 0.05
    assert float(z.std()) == pytest.approx(1.0, abs=0.05)
    # The draw depends on seed, key and step alone.
    again = one.draw_levels(BatchDraws(0, ["17"], 7), REPORT)
    assert again[0] == middle[17]


def test_model_time_is_large_where_noise_is() -> None:
    one = family("z-image")
    times = one.model_times(torch.tensor([0.0, 0.5, 0.9995, 1.0]))
    assert times.tolist() == [1000, 500, 1, 1]


def test_unknown_weighting_is_refused() -> None:
    schedule = FlowSchedule(torch.linspace(1, 0.001, 1000), torch.linspace(1000, 1, 1000))
    latent = torch.zeros(1, 1, 2, 2)
    with pytest.raises(ConfigError, match="expected one of none, sigma_sqrt, cosmap"):
        flow_loss(lambda x, _: x, latent, latent, torch.zeros(1), schedule, "min_snr_5")


@pytest.mark.parametrize(
    ("name", "setting", "said"),
    [
        ("flux2-klein-lora-photochat", "train.objective=report", "expected script"),
        ("sd15-photochat", "train.objective=report", "expected script"),
        ("z-image-lora-photochat", "train.weighting=min_snr_5", "none, sigma_sqrt, cosmap"),
        ("z-image-lora-photochat", "image.resolution=520", "a multiple of 16 pixels"),
        ("sana-photochat", "image.resolution=528", "a multiple of 32 pixels"),
        ("z-image-lora-photochat", "train.compile=true", "differ in length"),
        ("z-image-lora-photochat", "text.encode=stored", "expected text.latents=none"),
        ("z-image-lora-photochat", "adapter.targets=to_q", "script, all-linear, or a list"),
        ("uvit-s-photochat", "encoders.clip_text=null", "expected a CLIP text encoder"),
    ],
)
def test_setting_that_does_not_fit_is_refused(name: str, setting: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_recipe(name, [setting])
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_dialog_is_not_cut_to_window_of_clip() -> None:
    """The text encoder's own window is several times as long."""
    turns = [Turn(None, f"turn {number} " + "of many words " * 4) for number in range(20)]
    for name in ("z-image-lora-photochat", "flux2-klein-lora-photochat", "sana-photochat"):
        line = context_text(turns, load_recipe(name).text)
        assert all(f"turn {number} " in line for number in range(20))
    with pytest.raises(ConfigError, match="expected token"):
        resolve_recipe("sana-photochat", ["text.cut=turn"])


def test_defaults_of_flow_transformers_are_those_of_published_scripts() -> None:
    for name in ("z-image-lora-photochat", "flux2-klein-lora-photochat", "sana-photochat"):
        recipe = load_recipe(name)
        train = recipe.train
        assert (train.objective, train.latents) == ("script", "mean")
        assert train.text_encoder_precision == recipe.sample.precision == "bf16"
        assert recipe.encoders.clip_text is None
        assert recipe.text.encode == "on_the_fly"


@pytest.mark.parametrize("name", ["sd3", "flux1", "qwen-image"])
def test_family_with_loss_alone_says_so(name: str) -> None:
    one: Any = family(name)
    with pytest.raises(ConfigError, match="its loss alone; evaluate it as --system diffusers:"):
        one.encode_prompts(None, [""], "cpu")
    with pytest.raises(ConfigError, match="expected script"):
        one.report_schedule(torch.zeros(1))
