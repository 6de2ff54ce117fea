"""The demo VAE keeps the attributes that the judge reads."""

import io
import random

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from d2i.demo.judge import attribute_accuracy, read_all
from d2i.demo.render import render_scene
from d2i.demo.scene import Scene, all_scenes
from d2i.encoders import Vae


def jpeg_pixels(scene: Scene, jitter_seed: int) -> npt.NDArray[np.uint8]:
    buffer = io.BytesIO()
    render_scene(scene, jitter_seed).save(buffer, "JPEG", quality=95)
    return np.asarray(Image.open(buffer))


def test_vae_reconstructions_are_judged_correctly() -> None:
    scenes = random.Random(17).sample(all_scenes(), 160)
    codec = Vae("demo:vae", "kl")
    moments = codec.encode(np.stack([jpeg_pixels(s, i) for i, s in enumerate(scenes)]), 32)
    decoded = codec.decode(torch.from_numpy(moments[:, :4]), 32)
    shares = attribute_accuracy(read_all([Image.fromarray(pixels) for pixels in decoded]), scenes)
    assert min(shares.values()) >= 0.95
