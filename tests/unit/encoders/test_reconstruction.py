"""Reconstruction: PSNR and mean absolute error, and the warning about an autoencoder that loses."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from d2i.config import ImageConfig
from d2i.demo.render import render_scene
from d2i.demo.scene import split_scenes
from d2i.encoders import Vae
from d2i.encoders.reconstruction import NUM_MEASURED, Reconstruction, compare, measure
from d2i.images.decode import decode_square, open_header
from tests.shared import SHARED, needs_shared

PHOTOS = Path(__file__).resolve().parents[2] / "photos"


def photographs(resolution: int) -> NDArray[np.uint8]:
    """Read some of the project's photographs, uint8 (N, H, H, 3)."""
    config = ImageConfig(resolution=resolution)
    paths = sorted(PHOTOS.glob("*.jpg"))[:NUM_MEASURED]
    return np.stack(
        [decode_square(open_header(p.read_bytes(), config), config).pixels for p in paths]
    )


def test_figures_of_known_differences() -> None:
    images = np.full((2, 8, 8, 3), 100, np.uint8)
    decoded = images.copy()
    decoded[0] += 10
    decoded[1] -= 20
    # 20 log10(255 / 10) and 20 log10(255 / 20), averaged.
    assert compare(images, decoded) == Reconstruction(2, psnr_db=25.12, mae=15.0)
    assert compare(images, images) == Reconstruction(2, psnr_db=58.92, mae=0.0)


def test_poor_reconstruction_is_a_warning_of_one_line() -> None:
    assert Reconstruction(8, psnr_db=20.0, mae=1.0).warning("x") is None
    warning = Reconstruction(8, psnr_db=19.9, mae=1.0).warning("x")
    assert warning is not None and "\n" not in warning
    assert "got a PSNR of 19.9 dB on 8" in warning and "--recipe small" in warning


@pytest.mark.parametrize("resolution", [64, 128])
def test_demo_codec_loses_photographs(resolution: int) -> None:
    found = measure(Vae("demo:vae", "kl"), photographs(resolution))
    assert found.warning("demo:vae") is not None, found


def test_demo_codec_keeps_images_of_the_demo() -> None:
    scenes = random.Random(0).sample(split_scenes()[0], NUM_MEASURED)
    images = np.stack([np.asarray(render_scene(scene, None)) for scene in scenes])
    found = measure(Vae("demo:vae", "kl"), images)
    assert found.warning("demo:vae") is None, found


@needs_shared
@pytest.mark.parametrize("resolution", [64, 128])
def test_taesd_keeps_photographs(resolution: int) -> None:
    vae = Vae(str(SHARED / "weights" / "taesd_fp8.safetensors"), "tiny")
    found = measure(vae, photographs(resolution))
    assert found.warning("taesd") is None, found
