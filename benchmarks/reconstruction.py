"""Reconstruction of photographs, and of the demo's images, by autoencoders.

    python benchmarks/reconstruction.py --photos photos --vae taesd.safetensors --num 48

Encodes a seeded sample of images, rounds to the float16 of shards, decodes, and compares: PSNR and
mean absolute error, as `d2i inspect` and `d2i preprocess` do. The autoencoders: the one given,
the demo's, and one of Stable Diffusion's size with random weights. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from d2i.config import ImageConfig
from d2i.demo.corpus import write_corpus
from d2i.encoders import Vae
from d2i.encoders.reconstruction import compare, reconstruct
from d2i.images.decode import ImageRejectedError, decode_square, open_header


def read_sample(directory: Path, num: int, resolution: int) -> NDArray[np.uint8]:
    """Read a seeded sample of JPEG files, cropped and resized as for encoding."""
    config, squares = ImageConfig(resolution=resolution), []
    paths = sorted(directory.rglob("*.jpg"))
    random.Random(0).shuffle(paths)
    for path in paths:
        try:
            squares.append(decode_square(open_header(path.read_bytes(), config), config).pixels)
        except ImageRejectedError:
            continue  # The demo breaks a few images on purpose.
        if len(squares) == num:
            break
    return np.stack(squares)


def measure(vae: Vae, pixels: NDArray[np.uint8]) -> dict[str, float]:
    """Return the figures of one autoencoder on some images."""
    stored = vae.encode(pixels, batch_size=4).astype(np.float16)
    return asdict(compare(pixels, reconstruct(vae, stored)))


def save_random(directory: Path) -> str:
    """Save an autoencoder of Stable Diffusion's architecture with random weights."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae: Any = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )
    vae.save_pretrained(directory)
    return str(directory)


def main() -> None:
    """Measure every autoencoder and print the line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--photos", type=Path, required=True, help="directory of JPEG files")
    parser.add_argument("--vae", required=True, help="the weights of an AutoencoderTiny")
    parser.add_argument("--num", type=int, default=48)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        write_corpus(Path(temporary, "demo"), 200, seed=0)
        scenes = read_sample(Path(temporary, "demo"), args.num, 64)
        given, demo = Vae(args.vae, "tiny"), Vae("demo:vae", "kl")
        untrained = Vae(save_random(Path(temporary, "kl")), "kl")
        found = {"demo images, 64 px": {"given": measure(given, scenes)}}
        found["demo images, 64 px"]["demo:vae"] = measure(demo, scenes)
        for side in (64, 128, 256):
            photos = read_sample(args.photos, args.num, side)
            found[f"photographs, {side} px"] = {
                "given": measure(given, photos),
                "demo:vae": measure(demo, photos),
            }
        # Its figures hardly depend on the image, and it is slow.
        few = read_sample(args.photos, 4, 128)
        found["photographs, 128 px"]["random kl-f8c4"] = measure(untrained, few)
    machine = f"{platform.machine()}, Python {platform.python_version()}"
    print(json.dumps({"benchmark": "reconstruction", "images": found, "machine": machine}))


if __name__ == "__main__":
    main()
