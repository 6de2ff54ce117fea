"""Published weights in networks for longer contexts and other latent sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from d2i.config import BackboneConfig, SampleConfig, TextConfig
from d2i.diffusion import noise_prediction_loss
from d2i.encoders import ClipText, Vae
from d2i.errors import CheckpointError
from d2i.eval.sampler import Sampler
from d2i.models import build_backbone, read_state_dict, save_weights
from d2i.models.model_dir import build_network
from d2i.models.positions import fit_positions
from d2i.models.unidiffuser.objective import unidiffuser_loss
from d2i.prompt_text import text_tokens
from d2i.tokenize import WINDOW_LENGTH

SIZES: dict[str, Any] = {"latent_size": 4, "dim": 16, "depth": 2, "num_heads": 2, "text_dim": 8}
NAMES = ("uvit-s", "unidiffuser-v0", "unidiffuser-v1")


@pytest.fixture(params=NAMES)
def config(request: pytest.FixtureRequest, tmp_path: Path) -> BackboneConfig:
    """Return a backbone with weights for one window."""
    torch.manual_seed(0)
    save_weights(build_backbone(request.param, **SIZES), tmp_path / "w.safetensors")
    return BackboneConfig(name=request.param, weights=str(tmp_path / "w.safetensors"), **SIZES)


def with_windows(config: BackboneConfig, num_windows: int) -> Any:
    """Build the network for a number of windows."""
    tokens = {"num_text_tokens": WINDOW_LENGTH * num_windows}
    return build_network(config.model_copy(update=tokens))


def loss_of(network: Any, text: Tensor) -> Tensor:
    """Compute a training loss with fixed noise."""
    torch.manual_seed(1)
    latent, n = torch.randn(2, 4, 4, 4), torch.tensor([3, 800])
    if not hasattr(network, "clip_dim"):
        return noise_prediction_loss(network, latent, text, n, torch.randn_like(latent)).mean()
    parts = (latent, torch.randn(2, 1, network.clip_dim), text)
    noises = [torch.randn_like(part) for part in parts]
    return unidiffuser_loss(network, parts, n, n, noises).mean()


def test_fit_positions_of_one_window_changes_nothing(config: BackboneConfig) -> None:
    published, network = build_network(config), with_windows(config, 1)
    state = read_state_dict(str(config.weights))
    fitted = fit_positions(state, network)
    assert all(fitted[key] is state[key] for key in state)
    text = torch.randn(2, WINDOW_LENGTH, 8)
    assert torch.equal(loss_of(network, text), loss_of(published, text))


@pytest.mark.parametrize("num_windows", [2, 3, 4])
def test_fit_positions_repeats_text_positions_per_window(
    config: BackboneConfig, num_windows: int
) -> None:
    state = read_state_dict(str(config.weights))
    network = with_windows(config, num_windows)
    found = network.state_dict()
    first, end = network.num_time_tokens, network.num_time_tokens + WINDOW_LENGTH
    old, new = state.pop("pos_embed"), found.pop("pos_embed")
    assert new.shape[1] == old.shape[1] + (num_windows - 1) * WINDOW_LENGTH
    assert torch.equal(new[:, :first], old[:, :first])
    for window in range(num_windows):
        start = first + window * WINDOW_LENGTH
        assert torch.equal(new[:, start : start + WINDOW_LENGTH], old[:, first:end])
    assert torch.equal(new[:, first + num_windows * WINDOW_LENGTH :], old[:, end:])
    assert all(torch.equal(found[key], state[key]) for key in state)


def test_every_window_affects_loss_and_gets_gradient(config: BackboneConfig) -> None:
    network = with_windows(config, 2)
    text = torch.randn(2, 2 * WINDOW_LENGTH, 8)
    loss = loss_of(network, text)
    loss.backward()
    first = network.num_time_tokens
    gradient = network.pos_embed.grad[:, first : first + 2 * WINDOW_LENGTH]
    assert (gradient != 0).any(-1).all()
    # Gradients differ, so that fine-tuning can tell the windows apart.
    assert (gradient[:, :WINDOW_LENGTH] != gradient[:, WINDOW_LENGTH:]).any()
    for window in range(2):
        other = text.clone()
        other[:, window * WINDOW_LENGTH] += 1
        assert loss_of(network, other) != loss


@pytest.mark.parametrize(("name", "latent_size"), [("uvit-s", 32), ("unidiffuser-v1", 64)])
def test_fit_positions_supports_other_latent_sizes(name: str, latent_size: int) -> None:
    thin: dict[str, Any] = {"dim": 4, "depth": 2, "num_heads": 1}
    published: Any = build_backbone(name, **thin)
    assert published.latent_size == latent_size
    for other in (16, 24, 48):
        network: Any = build_backbone(name, **thin, latent_size=other, num_text_tokens=154)
        fitted = fit_positions(published.state_dict(), network)["pos_embed"]
        assert fitted.shape == network.pos_embed.shape


def test_other_latent_size_matches_published_interpolation(
    config: BackboneConfig,
) -> None:
    published = build_network(config)
    resized: Any = build_network(config.model_copy(update={"latent_size": 8}))
    torch.manual_seed(2)
    latent, text, n = torch.randn(1, 4, 8, 8), torch.randn(1, WINDOW_LENGTH, 8), torch.tensor([7])
    with torch.no_grad():
        if config.name == "uvit-s":
            pairs = [(resized(latent, n, text), published(latent, n, text))]
        else:
            inputs = (latent, torch.randn(1, 1, 512), text, n, n)
            pairs = list(zip(resized(*inputs), published(*inputs), strict=True))
    for found, expected in pairs:
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    both = config.model_copy(update={"latent_size": 8, "num_text_tokens": 2 * WINDOW_LENGTH})
    assert build_network(both).pos_embed.shape[1] == resized.pos_embed.shape[1] + WINDOW_LENGTH


def test_partial_window_is_rejected(config: BackboneConfig) -> None:
    for num_text_tokens in (76, 78, 80, 100):
        with pytest.raises(CheckpointError, match=r"mis-shaped \(pos_embed"):
            wrong = {"num_text_tokens": num_text_tokens, "latent_size": 8}
            build_network(config.model_copy(update=wrong))
    save_weights(with_windows(config, 2), Path(str(config.weights)))
    with pytest.raises(CheckpointError, match=r"mis-shaped \(pos_embed"):
        build_network(config)


def test_demo_network_generates_from_two_windows() -> None:
    text_config = TextConfig(num_windows=2)
    words = "a big red ball on the beach at night " * 20
    tokens = np.stack([text_tokens(text, text_config) for text in (words, "")])
    text = ClipText("demo:clip_text").encode(tokens, 2)
    assert text.shape == (2, 2 * WINDOW_LENGTH, 64)
    backbone = BackboneConfig(name="uvit-s", weights="demo:backbone", num_text_tokens=154)
    config = SampleConfig(num_steps=1, compute_batch_size=2)
    sampler = Sampler(backbone, Vae("demo:vae", "kl"), config, text[1])
    short = text[:1].copy()
    short[:, WINDOW_LENGTH:] = text[1, WINDOW_LENGTH:]
    images = sampler.generate(["a", "a"], np.concatenate([text[:1], short]))
    assert images.shape == (2, 64, 64, 3)
    assert (images[0] != images[1]).any()
