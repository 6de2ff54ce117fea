"""Autoencoders of each class that d2i reads: arrays, decoding, and those that it refuses."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

from d2i.config import ImageConfig, TextConfig
from d2i.encoders import Encoders, Vae, load_encoders
from d2i.errors import CheckpointError, ConfigError
from d2i.models.image_codec import KL_F8C4
from d2i.recipes import load_recipe
from tests.integration.pipelines import save_tiny_autoencoder

SIDE = 64
ARRAYS: dict[str, tuple[str, tuple[int, ...]]] = {
    "kl-f8c4": ("moments", (8, 8, 8)),
    "kl-f8c16": ("moments", (32, 8, 8)),
    "flux2": ("moments", (64, 8, 8)),
    "dc-ae-f32": ("latent", (32, 2, 2)),
    "tiny-kl-f8c4": ("moments", (8, 8, 8)),
    "tiny-kl-f8c16": ("moments", (32, 8, 8)),
}
FORMAT_1 = ("kl-f8c4", "tiny-kl-f8c4")


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("autoencoders")
    return {name: save_tiny_autoencoder(directory / name, name) for name in ARRAYS}


@pytest.fixture(scope="module")
def demo() -> Encoders:
    return load_encoders(load_recipe("demo").encoders)


def with_vae(encoders: Encoders, vae: Vae) -> Encoders:
    changed = copy.copy(encoders)
    changed.vae = vae
    return changed


def pixels(num: int) -> Any:
    return np.random.default_rng(0).integers(0, 256, (num, SIDE, SIDE, 3), np.uint8)


@pytest.mark.parametrize("kind", ["kl", "tiny"])
@pytest.mark.parametrize("name", ARRAYS)
def test_directory_names_its_class(
    name: str, kind: Literal["kl", "tiny"], places: dict[str, Path], demo: Encoders
) -> None:
    """Whatever `encoders.vae_kind` says, which is for single files."""
    array, shape = ARRAYS[name]
    vae = Vae(str(places[name]), kind)
    assert vae.codec.name == name.removeprefix("tiny-")
    encoders = with_vae(demo, vae)
    declared = encoders.arrays(ImageConfig(resolution=SIDE), TextConfig())[array]
    assert (declared.encoder, declared.dtype, declared.shape) == ("vae", "float16", shape)
    encoded = encoders.encode_images(pixels(3))
    assert encoded.keys() == {array, "clip"}
    assert (encoded[array].dtype, encoded[array].shape) == (np.float16, (3, *shape))
    if name.startswith("tiny-"):
        assert (encoded[array][:, shape[0] // 2 :] == -30).all()


@pytest.mark.parametrize("name", ARRAYS)
def test_decoded_image_is_that_of_module_itself(name: str, places: dict[str, Path]) -> None:
    vae = Vae(str(places[name]), "kl")
    codec, numbers = vae.codec, vae.codec.numbers(vae.module)
    stored = torch.from_numpy(vae.encode(pixels(2), 2))
    mean = codec.mean(stored)
    assert mean.shape[1:] == codec.latent_shape(SIDE // codec.factor)
    with torch.inference_mode():
        images = torch.from_numpy(pixels(2)).permute(0, 3, 1, 2) / 127.5 - 1
        encoded = vae.module.encode(images)
        (own,) = encoded.values()
        own = own if isinstance(own, torch.Tensor) else own.mode()
        torch.testing.assert_close(mean, own)
        expected = ((vae.module.decode(mean).sample + 1) * 127.5).round().clamp(0, 255)
    latents = codec.normalised(mean, numbers)
    found = vae.decode(codec.denormalised(latents, numbers), 2)
    difference = np.abs(found.astype(float) - expected.permute(0, 2, 3, 1).numpy())
    assert found.shape == (2, SIDE, SIDE, 3)
    # Rounding of latents may move a value across the middle of two pixel values.
    assert difference.max() <= 1
    assert difference.mean() < 1e-3


def test_latents_are_drawn_where_there_is_a_variance(places: dict[str, Path]) -> None:
    for name in ("flux2", "dc-ae-f32"):
        vae = Vae(str(places[name]), "kl")
        stored = torch.from_numpy(vae.encode(pixels(1), 1))
        mean = vae.codec.mean(stored)
        drawn = vae.codec.raw(stored, torch.ones_like(mean))
        assert drawn.shape == mean.shape
        assert drawn.equal(mean) == (name == "dc-ae-f32")


@pytest.mark.parametrize("name", ["flux2", "kl-f8c16"])
def test_numbers_are_those_of_the_file(name: str, places: dict[str, Path]) -> None:
    vae = Vae(str(places[name]), "kl")
    numbers = vae.codec.numbers(vae.module)
    if name == "kl-f8c16":
        assert numbers == {"scaling_factor": 0.3611, "shift_factor": 0.1159}
        return
    raw = torch.randn(2, *vae.codec.latent_shape(4))
    norm = vae.module.bn
    # The batch norm itself, in evaluation mode, is the published normalisation.
    expected = norm(torch.nn.functional.pixel_unshuffle(raw, 2))
    torch.testing.assert_close(vae.codec.normalised(raw, numbers), expected)


def test_resolution_must_be_multiple_of_factor(places: dict[str, Path], demo: Encoders) -> None:
    for name, resolution, multiple in (("dc-ae-f32", 72, 32), ("flux2", 72, 16)):
        encoders = with_vae(demo, Vae(str(places[name]), "kl"))
        message = rf"image\.resolution={resolution}: expected a multiple of {multiple} .*{name}"
        with pytest.raises(ConfigError, match=message):
            encoders.arrays(ImageConfig(resolution=resolution), TextConfig())


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("kl-f8c4", {"_class_name": "AsymmetricAutoencoderKL"}, "got AsymmetricAutoencoderKL, exp"),
        ("kl-f8c4", {"latent_channels": 3}, "AutoencoderKL with latents of 3 channels, exp"),
        ("flux2", {"latent_channels": 16}, r"AutoencoderKLFlux2 .* 16 .* expected 32 \(flux2\)"),
    ],
)
def test_unknown_autoencoders_are_refused_by_name(
    name: str, change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    sizes = {key: value for key, value in change.items() if not key.startswith("_")}
    save_tiny_autoencoder(tmp_path, name, **sizes)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(CheckpointError, match=message):
        Vae(str(tmp_path), "kl")


def test_network_of_another_codec_is_refused(places: dict[str, Path]) -> None:
    vae = Vae(str(places["kl-f8c16"]), "kl")
    with pytest.raises(CheckpointError, match=r"of kl-f8c16, expected .* kl-f8c4, on which uvit-s"):
        vae.check_codec(KL_F8C4, "uvit-s")
