"""Speed of `d2i preprocess`, compared with a bare loop that decodes and encodes as much.

    python benchmarks/pipeline.py --photos photos --vae taesd.safetensors --num 320 --repeats 3

The photographs of a directory, each under several names, become squares of 256 pixels and latents
of a tiny autoencoder and of the demo's CLIP: in as many plain processes as there are workers
(Pillow's `open`, `convert`, `crop`, `resize`, then the encoders, 32 at a time, one thread each),
and by d2i on Ray with as many workers (plan, fetch workers, encode workers, shards, ledger).
Loading, and the time before the first shard, are excluded from both. Prints one JSON line: images
per second, all repeats, the ratio, and d2i's total time, from its call to the manifest.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from d2i.cluster import Session
from d2i.config import Recipe
from d2i.recipes import resolve_recipe

SIDE, BATCH = 256, 32


def make_chats(photos: Path, directory: Path, num: int) -> list[str]:
    """Write one chat for each image; return the names of the images."""
    files = sorted(photos.rglob("*.jpg"))
    names = [f"{number:06d}.jpg" for number in range(num)]
    lines = []
    for number, name in enumerate(names):
        shutil.copyfile(files[number % len(files)], directory / name)
        turns = [{"text": "what did you see", "images": []}, {"text": "", "images": [name]}]
        lines.append(json.dumps({"id": str(number), "turns": turns}))
    (directory / "train.jsonl").write_text("\n".join(lines))
    return names


def recipe_of(vae: Path, num_per_shard: int) -> Recipe:
    """Return the demo's recipe with a real autoencoder, and tokens instead of text latents."""
    return resolve_recipe(
        "demo",
        [
            f"image.resolution={SIDE}",
            f"encoders.vae={vae}",
            "encoders.vae_kind=tiny",
            f"encoders.compute_batch_size={BATCH}",
            "text.latents=none",
            f"preprocess.num_samples_per_shard={num_per_shard}",
        ],
    )


def bare(directory: str, names: list[str], recipe: Recipe, queue: Any, start: Any) -> None:
    """Decode and encode in this process, as a plain program would."""
    import torch

    from d2i.encoders import load_encoders

    torch.set_num_threads(1)
    encoders = load_encoders(recipe.encoders)
    encoders.encode_images(np.zeros((BATCH, SIDE, SIDE, 3), np.uint8))
    start.wait()
    began = time.perf_counter()
    for first in range(0, len(names), BATCH):
        squares = [_square(Path(directory) / name) for name in names[first : first + BATCH]]
        encoders.encode_images(np.stack(squares))
    queue.put(time.perf_counter() - began)


def _square(path: Path) -> np.ndarray[Any, Any]:
    image = Image.open(path).convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    return np.asarray(square.resize((SIDE, SIDE), Image.Resampling.LANCZOS))


def measure_bare(directory: Path, names: list[str], recipe: Recipe, num_workers: int) -> float:
    """Return images per second of all processes together."""
    context = multiprocessing.get_context("spawn")
    queue, start = context.Queue(), context.Barrier(num_workers)
    parts = [names[number::num_workers] for number in range(num_workers)]
    processes = [
        context.Process(target=bare, args=(str(directory), part, recipe, queue, start))
        for part in parts
    ]
    for process in processes:
        process.start()
    seconds = max(queue.get() for _ in processes)
    for process in processes:
        process.join()
    return len(names) / seconds


def measure_d2i(directory: Path, recipe: Recipe, num_workers: int) -> dict[str, float]:
    """Return images per second after the first shard, and the seconds of the whole call."""
    from d2i.preprocess.job import PreprocessRequest, preprocess

    seen: list[tuple[float, int]] = []

    def look(progress: Any) -> None:
        if progress.num_done and (not seen or progress.num_done > seen[-1][1]):
            seen.append((time.perf_counter(), progress.num_done))

    with tempfile.TemporaryDirectory() as out:
        began = time.perf_counter()
        request = PreprocessRequest("jsonl", str(directory), out, recipe)
        with Session(num_workers) as session:
            preprocess(request, session, look)
        whole_s = time.perf_counter() - began
    (first_at, first), (last_at, last) = seen[0], seen[-1]
    return {"per_s": (last - first) / (last_at - first_at), "whole_s": whole_s}


def machine() -> dict[str, object]:
    """Describe the machine."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {"processor": names[0] if names else platform.machine(), "cores": len(names)}


def main() -> None:
    """Measure both alternately, and print one JSON line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--photos", type=Path, required=True, help="Directory of JPEG files.")
    parser.add_argument(
        "--vae", type=Path, required=True, help="The weights file of an AutoencoderTiny."
    )
    parser.add_argument("--num", type=int, default=320)
    parser.add_argument("--num-per-shard", type=int, default=32)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    recipe = recipe_of(options.vae.resolve(), options.num_per_shard)
    runs: list[tuple[float, dict[str, float]]] = []
    with tempfile.TemporaryDirectory() as directory:
        names = make_chats(options.photos, Path(directory), options.num)
        for _ in range(options.repeats):
            plain = measure_bare(Path(directory), names, recipe, options.workers)
            runs.append((plain, measure_d2i(Path(directory), recipe, options.workers)))
    ratios = [ours["per_s"] / plain for plain, ours in runs]
    result = {
        "machine": machine(),
        "python": platform.python_version(),
        "workers": options.workers,
        "bare_per_s": [round(plain, 1) for plain, _ in runs],
        "d2i_per_s": [round(ours["per_s"], 1) for _, ours in runs],
        "d2i_whole_s": [round(ours["whole_s"], 1) for _, ours in runs],
        "ratio": round(statistics.median(ratios), 2),
        "all_ratios": [round(ratio, 2) for ratio in ratios],
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
