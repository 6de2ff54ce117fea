"""Error of the features in shards when they are encoded in bf16 or fp16.

    python benchmarks/precision.py --photos photos --vae taesd.safetensors --num 64

Encodes photographs and lines of text in float32 and in lower precision (torch's autocast, as
`preprocess.encoder_precision` does), and compares moments, CLIP embeddings and CLIP text latents:
the largest difference, and the root mean square of the differences relative to that of the
features. The error of rounding to float16, the dtype of shards, is reported as well. Prints one
JSON line; speed depends on the device.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from d2i.config import EncodersConfig, ImageConfig, Precision
from d2i.encoders import load_encoders
from d2i.images.decode import decode_square, open_header
from d2i.tokenize import encode, window

LINES = [
    f"# {opening} # {ending}"
    for opening in ("i saw a big red ball", "look at my dog", "we were at the beach all day")
    for ending in ("at night", "he is so happy", "send me a photo", "no wait, the blue one")
]


def read_pixels(directory: Path, num: int, resolution: int) -> NDArray[np.uint8]:
    """Read photographs, cropped and resized as for encoding."""
    config = ImageConfig(resolution=resolution)
    paths = sorted(directory.rglob("*.jpg"))[:num]
    squares = [decode_square(open_header(path.read_bytes(), config), config) for path in paths]
    return np.stack([square.pixels for square in squares])


def features(
    config: EncodersConfig, precision: Precision, pixels: NDArray[np.uint8], device: str
) -> tuple[dict[str, NDArray[np.float32]], float]:
    """Encode everything; return the features and the seconds."""
    encoders = load_encoders(config, device, precision)
    tokens = np.stack([window(encode(line)) for line in LINES])
    batch_size = config.compute_batch_size
    started = time.perf_counter()
    found = {
        # An infinite log-variance cannot be compared.
        "moments": encoders.vae.encode(pixels, batch_size)[
            :, : 4 if config.vae_kind == "tiny" else 8
        ],
        "clip": encoders.clip_image.encode(pixels, batch_size),
        "text": encoders.clip_text.encode(tokens, batch_size),
    }
    return found, time.perf_counter() - started


def error(exact: NDArray[np.float32], other: NDArray[Any]) -> dict[str, float]:
    """Return the largest difference of features, and the relative root mean square error."""
    difference = other.astype(np.float64) - exact
    relative = np.sqrt(np.mean(difference**2) / np.mean(exact.astype(np.float64) ** 2))
    return {
        "max": float(f"{np.abs(difference).max():.3g}"),
        "relative_rms": float(f"{relative:.3g}"),
    }


def main() -> None:
    """Measure every precision and print the line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--photos", type=Path, required=True, help="directory of JPEG files")
    parser.add_argument("--vae", required=True)
    parser.add_argument("--vae-kind", choices=("kl", "tiny"), default="tiny")
    parser.add_argument("--clip-image", default="demo:clip_image")
    parser.add_argument("--clip-text", default="demo:clip_text")
    parser.add_argument("--num", type=int, default=64)
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    config = EncodersConfig(
        vae=args.vae,
        vae_kind=args.vae_kind,
        clip_image=args.clip_image,
        clip_text=args.clip_text,
        compute_batch_size=8,
    )
    pixels = read_pixels(args.photos, args.num, args.resolution)
    exact, exact_s = features(config, "fp32", pixels, args.device)
    result: dict[str, Any] = {"benchmark": "precision", "num_pictures": len(pixels)}
    result |= {"resolution": args.resolution, "device": args.device, "fp32_s": round(exact_s, 1)}
    result["stored_fp16"] = {n: error(a, a.astype(np.float16)) for n, a in exact.items()}
    precisions: tuple[Precision, ...] = ("bf16", "fp16")
    for precision in precisions:
        found, seconds = features(config, precision, pixels, args.device)
        result[precision] = {name: error(exact[name], found[name]) for name in exact}
        result[precision]["seconds"] = round(seconds, 1)
    result["machine"] = f"{platform.machine()}, Python {platform.python_version()}"
    print(json.dumps(result))


if __name__ == "__main__":
    main()
