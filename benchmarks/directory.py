"""Speed of opening a directory of images, compared with an equivalent bare Pillow loop.

    python benchmarks/directory.py --photos photos --num 1000 --repeats 5

Saves the photographs of a directory with short sides of 256 (as in MMDialog), 500 and 1600 pixels,
and crops them alternately to squares of 256: in a loop of Pillow's `open`, `draft`, `convert`,
`crop`, `resize` (LANCZOS) and numpy's `asarray`, and by d2i (`ImageSource` over the directory, its
decoder, the hash of the bytes), each in this process. Prints one JSON line: images per CPU second
and per wall-clock second, medians, all repeats, and the ratios, which are the result.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from d2i.cluster import Session
from d2i.config import FetchConfig, ImageConfig
from d2i.dialog import ImageRef
from d2i.fetch.rate_limiter import create_shared_limiter
from d2i.fetch.result import FetchResult
from d2i.fetch.sources import PUBLIC_NETWORK, ImageSource, build_rate_limiter
from d2i.images.sandbox import Decoder
from d2i.preprocess.workers.fetch_worker import open_image

SIDE = 256
SHORT_SIDES = (256, 500, 1600)


def make_directory(photos: Path, directory: Path, num: int, short_side: int) -> list[str]:
    """Save photographs with a short side; return their names, several for the same image."""
    files = sorted(photos.rglob("*.jpg"))[: min(num, 100)]
    for number, path in enumerate(files):
        image = Image.open(path).convert("RGB")
        scale = short_side / min(image.size)
        size = (round(image.width * scale), round(image.height * scale))
        image.resize(size, Image.Resampling.BICUBIC).save(directory / f"{number}.jpg", quality=90)
    return [f"{number % len(files)}.jpg" for number in range(num)]


def bare(directory: Path, names: list[str]) -> None:
    """Open each image as a plain program would."""
    for name in names:
        image = Image.open(directory / name)
        image.draft("RGB", (2 * SIDE, 2 * SIDE))
        rgb = image.convert("RGB")
        side = min(rgb.size)
        left, top = (rgb.width - side) // 2, (rgb.height - side) // 2
        square = rgb.crop((left, top, left + side, top + side))
        np.asarray(square.resize((SIDE, SIDE), Image.Resampling.LANCZOS))


def by_d2i(directory: Path, names: list[str]) -> None:
    """Open each image as d2i's workers do."""
    config = FetchConfig()
    book = create_shared_limiter(build_rate_limiter(config), Session(0))
    source = ImageSource(str(directory), config, PUBLIC_NETWORK, book)
    decoder = Decoder(ImageConfig(resolution=SIDE), config.decode_timeout_s, config.max_decode_mib)

    def opened(ref: ImageRef, fetched: FetchResult) -> str:
        found = open_image(ref, fetched, decoder, is_kept=False)
        assert found.image is not None, found
        return found.image.sha256

    # Distinct names for the same files, because each name is read only once.
    refs = [ImageRef("file", (f"{'./' * (n // 100)}{name}",)) for n, name in enumerate(names)]
    num_opened = sum(1 for _ in source.fetch(refs, opened))
    decoder.close()
    assert num_opened == len(names)


def measured(work: Callable[[], None], num: int) -> dict[str, float]:
    """Return images per CPU second and per wall-clock second."""
    clock, processor = time.perf_counter(), time.process_time()
    work()
    clock, processor = time.perf_counter() - clock, time.process_time() - processor
    return {"per_cpu_s": num / processor, "per_s": num / clock}


def compare(directory: Path, names: list[str], repeats: int) -> dict[str, Any]:
    """Measure both alternately."""
    bare(directory, names[:50])
    by_d2i(directory, names[:50])
    runs = [
        {
            "bare": measured(lambda: bare(directory, names), len(names)),
            "d2i": measured(lambda: by_d2i(directory, names), len(names)),
        }
        for _ in range(repeats)
    ]
    result: dict[str, Any] = {}
    for unit in ("per_cpu_s", "per_s"):
        ratios = [run["d2i"][unit] / run["bare"][unit] for run in runs]
        rates = {who: [round(run[who][unit], 1) for run in runs] for who in ("bare", "d2i")}
        result[unit] = {
            **{who: statistics.median(values) for who, values in rates.items()},
            "all": rates,
            "ratio": round(statistics.median(ratios), 2),
            "all_ratios": [round(ratio, 2) for ratio in ratios],
        }
    return result


def machine() -> dict[str, object]:
    """Describe the machine."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {"processor": names[0] if names else platform.machine(), "cores": len(names)}


def main() -> None:
    """Measure each image size, and print one JSON line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--photos", type=Path, required=True, help="Directory of JPEG files.")
    parser.add_argument("--num", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--short-sides", type=int, nargs="+", default=list(SHORT_SIDES))
    options = parser.parse_args()
    found = {}
    for short_side in options.short_sides:
        with tempfile.TemporaryDirectory() as directory:
            names = make_directory(options.photos, Path(directory), options.num, short_side)
            found[str(short_side)] = compare(Path(directory), names, options.repeats)
    print(json.dumps({"machine": machine(), "python": platform.python_version(), **found}))


if __name__ == "__main__":
    main()
