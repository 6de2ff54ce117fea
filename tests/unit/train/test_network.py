"""The network built for training: settings of the recipe apply, state dict keys stay."""

from __future__ import annotations

import pytest
import torch

from d2i.config import apply_settings
from d2i.diffusion import noise_prediction_loss
from d2i.diffusion.schedule import default_schedule
from d2i.recipes import load_recipe
from d2i.train.network import build_trained_network


@pytest.mark.parametrize("is_enabled", [False, True])
def test_compile_and_activation_checkpointing_settings_apply(is_enabled: bool) -> None:
    recipe = load_recipe("demo")
    settings = [f"train.{name}={is_enabled}" for name in ("compile", "activation_checkpointing")]
    network = build_trained_network(apply_settings(recipe, [s.lower() for s in settings]))
    plain = build_trained_network(recipe)
    assert network.gradient_checkpointing is is_enabled
    blocks = [*network.in_blocks, network.mid_block, *network.out_blocks]
    assert all((block._compiled_call_impl is not None) is is_enabled for block in blocks)
    for (name, weight), (key, expected) in zip(
        network.state_dict().items(), plain.state_dict().items(), strict=True
    ):
        assert name == key
        assert torch.equal(weight, expected)


def test_bf16_keeps_float32_weights_gradients_and_loss() -> None:
    torch.manual_seed(0)
    recipe = apply_settings(load_recipe("demo"), ["train.precision=bf16"])
    plain, network = build_trained_network(load_recipe("demo")), build_trained_network(recipe)
    assert network.state_dict().keys() == plain.state_dict().keys()
    latent = torch.randn(2, 4, network.latent_size, network.latent_size)
    noise, text = (
        torch.randn_like(latent),
        torch.randn(2, network.num_text_tokens, network.text_dim),
    )
    n = torch.tensor([100, 900])
    outputs, expected = network(latent, n, text), plain(latent, n, text)
    assert outputs.dtype == torch.bfloat16
    relative_error = float(((outputs - expected).norm() / expected.norm()).detach())
    assert 1e-4 < relative_error < 5e-2
    loss = noise_prediction_loss(network, latent, text, n, noise)
    assert loss.dtype == torch.float32
    noised = default_schedule().add_noise(latent, noise, n)
    exact = (network(noised, n, text).double() - noise.double()).square().flatten(1).mean(1)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=0)
    loss.mean().backward()
    assert all(weight.grad.dtype == torch.float32 for weight in network.parameters())


def test_activation_checkpointing_in_bf16_keeps_gradients() -> None:
    torch.manual_seed(0)
    latent = None
    found = []
    for is_recomputed in ("false", "true"):
        settings = ["train.precision=bf16", f"train.activation_checkpointing={is_recomputed}"]
        network = build_trained_network(apply_settings(load_recipe("demo"), settings))
        if latent is None:
            latent = torch.randn(2, 4, network.latent_size, network.latent_size)
            text = torch.randn(2, network.num_text_tokens, network.text_dim)
        network(latent, torch.tensor([100, 900]), text).float().square().mean().backward()
        found.append({name: weight.grad for name, weight in network.named_parameters()})
    for name, gradient in found[0].items():
        assert torch.equal(gradient, found[1][name]), name
