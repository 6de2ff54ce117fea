"""Backbones equal diffusers' training scripts and pipelines, before and after a LoRA."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from d2i.backbones import presets_of
from d2i.config import AdapterConfig, SampleConfig
from d2i.diffusion.flow import shifted_schedule
from d2i.errors import ConfigError
from d2i.models import build_backbone, family, save_weights
from d2i.models.lora import add_lora, pack_lora
from tests.golden.arrays import facts, tensors
from tests.golden.backbones import fill_by_name, golden_conditions, golden_network
from tests.shared import needs_shared

pytestmark = needs_shared

NOISE = ["sd15", "sdxl"]
WHOLE_FLOW = ["z_image", "flux2_klein", "sana"]
FLOW = [*WHOLE_FLOW, "sd3", "flux1", "qwen_image"]
FAMILIES = [*NOISE, *WHOLE_FLOW]
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}
CLOSE_SAMPLE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4}
LORA = AdapterConfig(kind="lora", rank=4, alpha=8)


class GoldenDraws:
    """The golden start of sampling, whatever is drawn."""

    def __init__(self, start: Tensor) -> None:
        self._start = start.numpy()

    def normal(self, _part: str, _shape: tuple[int, ...], _step: int = 0) -> Any:
        return self._start


@pytest.mark.parametrize("name", NOISE)
def test_noise_prediction_and_losses_equal_training_script(name: str) -> None:
    golden, network, one = tensors(f"backbones/{name}"), golden_network(name), family(name)
    conditions, vae = golden_conditions(name), facts(f"backbones/{name}")["vae_numbers"]
    level = golden["in.n"]
    latent = one.codec.normalised(golden["in.raw"], vae)
    noisy = one.schedule(network).add_noise(latent, golden["in.noise"], level + 1)
    torch.testing.assert_close(noisy, golden["out.noisy"], **CLOSE)
    predicted = one.predict(network, noisy, level + 1, conditions)
    torch.testing.assert_close(predicted, golden["out.prediction"], **CLOSE)
    for weighting, stored in (("none", "out.losses"), ("min_snr_5", "out.losses.min_snr_5")):
        losses = one.losses(
            network,
            vae,
            golden["in.raw"],
            golden["in.noise"],
            level,
            conditions,
            weighting=weighting,
        )
        torch.testing.assert_close(losses, golden[stored], **CLOSE)


def test_weighting_for_other_objectives_is_refused() -> None:
    golden, network = tensors("backbones/sd15"), golden_network("sd15")
    with pytest.raises(ConfigError, match="expected one of none, min_snr_5"):
        family("sd15").losses(
            network,
            {"scaling_factor": 1.0},
            golden["in.raw"],
            golden["in.noise"],
            golden["in.n"],
            golden_conditions("sd15"),
            weighting="cosmap",
        )


@pytest.mark.parametrize("name", FLOW)
@pytest.mark.parametrize("weighting", ["none", "sigma_sqrt", "cosmap"])
def test_flow_losses_equal_training_script(name: str, weighting: str) -> None:
    golden = tensors(f"backbones/{name}")
    stored = golden["out.losses" + (f".{weighting}" if weighting != "none" else "")]
    losses = flow_losses(name, weighting)
    torch.testing.assert_close(losses, stored, **CLOSE)


def flow_losses(name: str, weighting: str = "none") -> Tensor:
    """Return the losses of the golden inputs."""
    golden = tensors(f"backbones/{name}")
    losses = family(name).losses(
        golden_network(name),
        facts(f"backbones/{name}")["vae_numbers"],
        golden["in.raw"],
        golden["in.noise"],
        golden["in.u"],
        golden_conditions(name),
        weighting=weighting,
    )
    return losses.detach()


@pytest.mark.parametrize("name", FLOW)
def test_losses_of_bare_network_are_on_published_levels(name: str) -> None:
    """A network that no directory describes has no scheduler; the autoencoder may be the module."""
    golden, network = tensors(f"backbones/{name}"), golden_network(name)
    del network.scheduler
    codec = family(name).codec
    numbers = facts(f"backbones/{name}")["vae_numbers"]
    module = SimpleNamespace(config=SimpleNamespace(**numbers), bn=None)
    vae: Any = numbers if codec.name == "flux2" else module
    losses = family(name).losses(
        network,
        vae,
        golden["in.raw"],
        golden["in.noise"],
        golden["in.u"],
        golden_conditions(name),
    )
    torch.testing.assert_close(losses, golden["out.losses"], **CLOSE)


@pytest.mark.parametrize("name", WHOLE_FLOW)
def test_flow_velocity_equals_training_script(name: str) -> None:
    golden, network = tensors(f"backbones/{name}"), golden_network(name)
    one: Any = family(name)
    schedule = one.flow_schedule(network, "script", golden["in.raw"])
    rows = schedule.rows(golden["in.u"])
    torch.testing.assert_close(schedule.sigmas[rows], golden["out.sigmas"], **CLOSE)
    torch.testing.assert_close(schedule.timesteps[rows], golden["out.timesteps"], **CLOSE)
    predicted = one.predict(
        network, golden["out.noisy"], golden["out.timesteps"], golden_conditions(name)
    )
    torch.testing.assert_close(predicted, golden["out.prediction"], **CLOSE)


@pytest.mark.parametrize("name", FLOW)
@pytest.mark.parametrize("mistake", ["sign", "shift", "scale"])
def test_mistake_fails_golden_losses(
    name: str, mistake: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind: Any = type(family(name))
    if mistake == "sign":
        predict = kind.predict
        monkeypatch.setattr(kind, "predict", lambda *given: -predict(*given))
    elif mistake == "shift":
        shift = 1.0 if facts(f"backbones/{name}")["scheduler_config"]["shift"] == 3.0 else 3.0
        is_dynamic = facts(f"backbones/{name}")["scheduler_config"]["use_dynamic_shifting"]
        wrong = shifted_schedule(3.0 if is_dynamic else shift)
        monkeypatch.setattr(kind, "flow_schedule", lambda *_: wrong)
    else:
        normalised = type(kind.codec).normalised
        monkeypatch.setattr(
            type(kind.codec), "normalised", lambda *given: 1.01 * normalised(*given)
        )
    losses = flow_losses(name)
    assert not torch.allclose(losses, tensors(f"backbones/{name}")["out.losses"], **CLOSE)


@pytest.mark.parametrize("name", FAMILIES)
def test_sampler_equals_stock_pipeline_before_and_after_lora(name: str, tmp_path: Path) -> None:
    golden, network = tensors(f"backbones/{name}"), golden_network(name)
    torch.testing.assert_close(sampled(name, network), golden["sample.base"], **CLOSE_SAMPLE)
    presets = family(name).presets
    trained = {
        name.removeprefix("lora.after.")
        .replace("lora_A.", "lora_A.default.")
        .replace("lora_B.", "lora_B.default."): tensor
        for name, tensor in golden.items()
        if name.startswith("lora.after.")
    }
    add_lora(network, LORA, presets, seed=0)
    adapted = dict(network.named_parameters())
    assert {key for key, p in adapted.items() if p.requires_grad} == trained.keys()
    for key, tensor in trained.items():
        adapted[key].data.copy_(tensor)
    torch.testing.assert_close(sampled(name, network), golden["sample.lora"], **CLOSE_SAMPLE)
    # The file that is left loads into the stock network with the same scale.
    tensors_of_file, metadata = pack_lora(trained, LORA, presets)
    save_weights(tensors_of_file, tmp_path / "pytorch_lora_weights.safetensors", metadata)
    stock = golden_network(name)
    pipeline_of(name, stock).load_lora_weights(tmp_path)
    torch.testing.assert_close(sampled(name, stock), golden["sample.lora"], **CLOSE_SAMPLE)


@pytest.mark.parametrize("name", FAMILIES)
def test_lora_of_every_linear_layer_loads_into_stock_pipeline(name: str, tmp_path: Path) -> None:
    config = AdapterConfig(kind="lora", rank=4, alpha=8, targets="all-linear")
    network, presets = golden_network(name), family(name).presets
    add_lora(network, config, presets, seed=0)
    fill_by_name(network, 1, part="lora_B")
    adapter = {key: p for key, p in network.named_parameters() if p.requires_grad}
    held, metadata = pack_lora(adapter, config, presets)
    save_weights(held, tmp_path / "pytorch_lora_weights.safetensors", metadata)
    stock = golden_network(name)
    pipeline_of(name, stock).load_lora_weights(tmp_path)
    num_placed = sum(".lora_" in key for key, _ in stock.named_parameters())
    assert num_placed == len(adapter)
    assert torch.equal(sampled(name, stock), sampled(name, network))


def pipeline_of(name: str, network: Any) -> Any:
    """Return the stock pipeline around a network alone."""
    import diffusers

    presets, one = family(name).presets, family(name)
    kind = getattr(diffusers, presets.pipeline or "")
    others = one.other_parts  # type: ignore[attr-defined]
    return kind(**{presets.network_part: network}, scheduler=network.scheduler, **others)


@torch.inference_mode()
def sampled(name: str, network: Any) -> Tensor:
    """Sample latents from the golden start with the golden settings, in the golden form."""
    conditions, start = golden_conditions(name), tensors(f"backbones/{name}")["in.start"]
    settings = SampleConfig(sampler="pipeline", num_steps=4, guidance_scale=2.0)
    rows = []
    for row in range(len(start)):
        given = {key: value[row : row + 1] for key, value in conditions.items()}
        unconditional = {key: torch.zeros_like(value[0]) for key, value in given.items()}
        if "mask" in given:
            # Z-Image's golden zeros are as long as the text, Sana's as the longest.
            is_sana = name == "sana"
            shown = given["mask"][0]
            unconditional["mask"] = torch.ones_like(shown) if is_sana else shown
        draws: Any = GoldenDraws(start[row : row + 1])
        rows.append(family(name).sampler(network, settings, unconditional)(given, draws))
    latents = torch.cat(rows)
    if name != "flux2_klein":
        return latents
    # Its pipeline alone returns raw latents.
    return family(name).codec.denormalised(latents, facts(f"backbones/{name}")["vae_numbers"])


@pytest.mark.parametrize(
    ("name", "num_parameters", "tera_flop"),
    [
        ("sd15", 859_520_964, 0.8),
        ("sdxl", 2_567_463_684, 6.8),
        ("z-image", 6_154_908_736, 62.5),
        ("flux2-klein", 3_875_544_576, 34.8),
        ("sana", 1_604_462_752, 2.97),
    ],
)
def test_published_networks_have_published_size(
    name: str, num_parameters: int, tera_flop: float
) -> None:
    with torch.device("meta"):
        network = build_backbone(name)
    assert sum(parameter.numel() for parameter in network.parameters()) == num_parameters
    assert family(name).flops(network) / 1e12 == pytest.approx(tera_flop, rel=0.01)


def test_lora_begins_as_base_model_and_is_keyed() -> None:
    networks = [golden_network("sd15") for _ in range(3)]
    before = sampled("sd15", networks[0])
    for network, seed in zip(networks, (0, 0, 1), strict=True):
        add_lora(network, LORA, presets_of("sd15"), seed)
    assert np.array_equal(sampled("sd15", networks[0]), before)
    first, same, other = (
        torch.cat([p.flatten() for p in network.parameters() if p.requires_grad])
        for network in networks
    )
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    drawn = torch.cat(
        [p.detach().flatten() for key, p in networks[0].named_parameters() if ".lora_A." in key]
    )
    assert float(drawn.std()) == pytest.approx(1 / LORA.rank, rel=0.1)
