"""The published autoencoder's weights compute the published numbers in diffusers' network."""

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL

from d2i.encoders import Vae
from d2i.errors import CheckpointError
from d2i.models import read_state_dict
from d2i.models.weights.autoencoder_layout import (
    autoencoder_config,
    diffusers_to_ldm,
    ldm_to_diffusers,
)
from d2i.weights_catalog import find_published, shapes_hash
from tests.golden.arrays import GOLDEN, facts, max_distance, tensors
from tests.shared import needs_shared

pytestmark = needs_shared

FP32_TOLERANCE = 2e-5
LOW_VARIANCE_TOLERANCE = 3e-4


@pytest.fixture(scope="module")
def autoencoder() -> Any:
    """The tiny autoencoder, through the layout that d2i writes."""
    state = ldm_to_diffusers(read_state_dict(GOLDEN / "autoencoder_tiny.safetensors"))
    config = autoencoder_config(state)
    network = AutoencoderKL(**{key: v for key, v in config.items() if key != "_class_name"})
    network.load_state_dict(state)
    return network.eval().requires_grad_(False)


def test_published_autoencoder_file_is_converted_on_load(autoencoder: Any) -> None:
    loaded = Vae(str(GOLDEN / "autoencoder_tiny.safetensors"), "kl").module.state_dict()
    expected = autoencoder.state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[key], expected[key]) for key in expected)


def test_wrong_weights_file_error_names_what_it_is() -> None:
    with pytest.raises(CheckpointError, match="U-ViT"):
        Vae(str(GOLDEN / "uvit_tiny.safetensors"), "kl")


def test_every_autoencoder_key_maps_to_published_key() -> None:
    state = read_state_dict(GOLDEN / "autoencoder_tiny.safetensors")
    renamed = ldm_to_diffusers(state)
    table = facts("autoencoder_tiny")["ldm_to_diffusers"]
    assert {entry["diffusers"] for entry in table.values()} == renamed.keys()
    for key, entry in table.items():
        assert torch.equal(renamed[entry["diffusers"]].flatten(), state[key].flatten())
    back = diffusers_to_ldm(renamed)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)


@pytest.mark.parametrize(
    ("size", "tolerance"),
    [("", FP32_TOLERANCE), ("_rect", FP32_TOLERANCE), ("_lowvar", LOW_VARIANCE_TOLERANCE)],
)
def test_autoencoder_moments_match_golden(autoencoder: Any, size: str, tolerance: float) -> None:
    golden = tensors("autoencoder_tiny")
    moments = autoencoder.encode(golden[f"image{size}"]).latent_dist.parameters
    assert max_distance(moments, golden[f"moments{size}"]) < tolerance
    assert max_distance(moments, golden[f"moments{size}_fp64"]) < tolerance


@pytest.mark.parametrize("scale", ["0.18215", "0.2301"])
@pytest.mark.parametrize("size", ["", "_rect"])
def test_autoencoder_decoding_matches_golden(autoencoder: Any, size: str, scale: str) -> None:
    golden = tensors("autoencoder_tiny")
    image = autoencoder.decode(golden[f"z{size}"] / float(scale)).sample
    assert max_distance(image, golden[f"decoded{size}_{scale}"]) < FP32_TOLERANCE
    assert max_distance(image, golden[f"decoded{size}_{scale}_fp64"]) < FP32_TOLERANCE


def test_full_size_autoencoder_keys_and_shapes_match_golden() -> None:
    with torch.device("meta"):
        network = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
        )
    state = diffusers_to_ldm(network.state_dict())
    shapes = {key: list(tensor.shape) for key, tensor in state.items()}
    assert shapes == facts("state_dict_shapes")["autoencoder_kl"]
    counts = facts("full_size")["counts"]["autoencoder_kl"]
    assert len(state) == counts["tensors"]
    assert sum(tensor.numel() for tensor in state.values()) == counts["parameters"]
    published = find_published(shapes)
    assert [file.name for file in published] == ["autoencoder_kl.pth", "autoencoder_kl_ema.pth"]
    assert published[0].shapes_sha256 == shapes_hash(shapes)
