"""Overhead of a shard beyond its samples: Ray's part, and publishing.

    python benchmarks/shard_overhead.py --num 800 --few 5 --many 200 --repeats 3

Prepares the same random images as a few big shards and as many small ones, with the same encoder
calls (the batch size divides both), in this process and on one Ray worker, and derives from the two
what a shard takes beyond its images, after the first one. Publishing alone (ledger, tar, index and
commit record, each flushed to disk) is timed separately. Prints one JSON line: wall-clock seconds
per shard, and CPU seconds if the work is done in this process; all repeats.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from d2i.cluster import Session
from d2i.config import Recipe
from d2i.preprocess.job import PreprocessRequest, preprocess
from d2i.preprocess.ledger import LedgerRow, write_ledger
from d2i.recipes import resolve_recipe
from d2i.shards import Sample, json_bytes, npy_bytes, write_shard

NUM_PUBLISHED = 50


def make_chats(directory: Path, num: int, side: int) -> None:
    """Write one chat for each image of random numbers."""
    random = np.random.default_rng(0)
    lines = []
    for number in range(num):
        pixels = random.integers(0, 256, (side, side, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(directory / f"{number:06d}.png")
        turns = [{"text": "look", "images": []}, {"text": "", "images": [f"{number:06d}.png"]}]
        lines.append(json.dumps({"id": str(number), "turns": turns}))
    (directory / "train.jsonl").write_text("\n".join(lines))


def seconds_per_image(source: Path, recipe: Recipe, num_workers: int) -> tuple[float, float]:
    """Return wall-clock and CPU seconds per image after the first shard."""
    marks: list[tuple[int, float, float]] = []

    def look(progress: Any) -> None:
        if progress.num_done and (not marks or progress.num_done > marks[-1][0]):
            marks.append((progress.num_done, time.perf_counter(), time.process_time()))

    with tempfile.TemporaryDirectory() as out:
        request = PreprocessRequest("jsonl", str(source), out, recipe)
        with Session(num_workers) as session:
            preprocess(request, session, look)
    (first, *started), (last, *ended) = marks[0], marks[-1]
    wall_s, cpu_s = (
        (end - start) / (last - first) for start, end in zip(started, ended, strict=True)
    )
    return wall_s, cpu_s


def seconds_per_shard(
    source: Path, recipes: dict[int, Recipe], num_workers: int
) -> tuple[float, float]:
    """Return wall-clock and CPU seconds per shard beyond its images.

    An image takes p + s / n, where s is the overhead of a shard of n images: two n give both.
    """
    (few, many) = (seconds_per_image(source, recipe, num_workers) for recipe in recipes.values())
    large, small = recipes
    wall_s, cpu_s = ((b - a) / (1 / small - 1 / large) for a, b in zip(few, many, strict=True))
    return wall_s, cpu_s


def publish(num_samples: int, side: int) -> tuple[float, float]:
    """Return wall-clock and CPU seconds of publishing a shard."""
    arrays = {"moments": (8, side // 8, side // 8), "clip": (512,), "text": (77, 64)}
    members = {f"{n}.npy": npy_bytes(np.zeros(shape, np.float16)) for n, shape in arrays.items()}
    members |= {"json": json_bytes({}), "tokens.npy": npy_bytes(np.zeros(77, np.uint16))}
    samples = [Sample(f"train-{number:06d}-0-0", members) for number in range(num_samples)]
    row = LedgerRow("k", "i", "ok", "ok", "", 1, None, None, 1, 1, 1, "0" * 64, 0.0)
    with tempfile.TemporaryDirectory() as directory:
        wall, cpu = time.perf_counter(), time.process_time()
        for index in range(NUM_PUBLISHED):
            write_ledger(directory, index, [row] * num_samples)
            write_shard(samples, directory, index, failures={})
        wall_s, cpu_s = time.perf_counter() - wall, time.process_time() - cpu
    return wall_s / NUM_PUBLISHED, cpu_s / NUM_PUBLISHED


def figures(repeats: list[tuple[float, float]]) -> dict[str, Any]:
    """Return medians and all repeats."""
    walls, cpus = ([round(seconds, 4) for seconds in part] for part in zip(*repeats, strict=True))
    return {
        "wall_s": round(statistics.median(walls), 4),
        "process_s": round(statistics.median(cpus), 4),
        "wall_s_repeats": walls,
        "process_s_repeats": cpus,
    }


def main() -> None:
    """Measure all alternately, and print the line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--num", type=int, default=800, help="images")
    parser.add_argument("--few", type=int, default=5, help="shards")
    parser.add_argument("--many", type=int, default=200, help="shards")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    small = args.num // args.many
    settings = ["image.resolution=64", f"encoders.compute_batch_size={small}"]
    recipes = {
        num: resolve_recipe("demo", [*settings, f"preprocess.num_samples_per_shard={num}"])
        for num in (args.num // args.few, small)
    }
    parts: dict[str, list[tuple[float, float]]] = {"here": [], "ray": [], "publishing": []}
    with tempfile.TemporaryDirectory() as directory:
        make_chats(Path(directory), args.num, 64)
        for _ in range(args.repeats):
            parts["here"].append(seconds_per_shard(Path(directory), recipes, 0))
            parts["ray"].append(seconds_per_shard(Path(directory), recipes, 1))
            parts["publishing"].append(publish(small, 64))
    result: dict[str, Any] = {"benchmark": "shard_overhead", **vars(args)}
    result |= {name: figures(repeats) for name, repeats in parts.items()}
    result["machine"] = f"{platform.machine()}, {os.cpu_count()} cores"
    result["python"] = platform.python_version()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
