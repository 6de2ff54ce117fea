"""Speed of one process reading samples in random order, compared with webdataset.

    python benchmarks/shard_reader.py --num-samples 2000 --repeats 5 --format 1

Writes two data sets of random numbers at 256 px sizes, with token ids only and with 77x768 text
latents, reads each through `ShardReader` (batches of 512, a new permutation each time) and through
`webdataset` (`.decode()`, in file order, its fastest), alternately, from the page cache. Also
measured are the first reads of a new `ShardReader`, which verifies the crc32 of every array, and of
one with `check_data=False`. Prints one JSON line: samples per wall-clock second and per CPU second
(less noisy on a busy machine), medians and all repeats, and the ratios of the medians.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from d2i.shards import Sample, ShardReader, json_bytes, npy_bytes, write_manifest, write_shard

SHAPES: dict[str, tuple[int, ...]] = {
    "moments": (8, 32, 32),
    "clip": (512,),
    "tokens": (77,),
    "text": (77, 768),
}
_HOW = ("checked", "unchecked")
LAYOUTS = {"tokens": ("moments", "clip", "tokens"), "text": ("moments", "clip", "text")}


def make_samples(members: tuple[str, ...], num_samples: int) -> Iterator[Sample]:
    """Yield samples of random numbers."""
    random = np.random.default_rng(0)
    for number in range(num_samples):
        encoded = {"json": json_bytes({"number": number})}
        for name in members:
            if name == "tokens":
                values: Any = random.integers(0, 49408, SHAPES[name]).astype(np.uint16)
            else:
                values = random.standard_normal(SHAPES[name]).astype(np.float16)
            encoded[f"{name}.npy"] = npy_bytes(values)
        yield Sample(f"train-{number}-0-0", encoded)


def read_d2i(reader: ShardReader, members: tuple[str, ...], batch_size: int, seed: int) -> int:
    """Read every sample once in random order; return their number."""
    order = np.random.default_rng(seed).permutation(len(reader))
    batches = (order[start : start + batch_size] for start in range(0, len(order), batch_size))
    return sum(len(reader.read(batch, members)[members[0]]) for batch in batches)


def read_first(
    directory: Path, members: tuple[str, ...], batch_size: int, seed: int, *, check_data: bool
) -> int:
    """Read every sample as a new process does; return their number."""
    reader = ShardReader(str(directory), check_data=check_data)
    return read_d2i(reader, members, batch_size, seed)


def read_webdataset(path: Path) -> int:
    """Read every sample once in file order; return their number."""
    import webdataset

    return sum(1 for _ in webdataset.WebDataset([str(path)], shardshuffle=False).decode())


def declare(members: tuple[str, ...]) -> dict[str, Any]:
    """Return a fingerprint of format 2 with these arrays."""
    arrays = {
        name: {
            "dtype": "uint16" if name == "tokens" else "float16",
            "shape": list(SHAPES[name]),
            "encoder": "none",
        }
        for name in members
    }
    return {"format": 2, "arrays": arrays, "encoders": {"none": {"sha256": "0" * 64}}}


class Timings:
    """Samples per wall-clock second and per CPU second of repeated passes."""

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def add(self, read: Callable[..., int], *args: Any) -> None:
        """Time one pass."""
        wall, cpu = time.perf_counter(), time.process_time()
        num_read = read(*args)
        self.wall.append(num_read / (time.perf_counter() - wall))
        self.cpu.append(num_read / (time.process_time() - cpu))

    def figures(self) -> dict[str, Any]:
        """Return medians and repeats, without the first pass, which warms the page cache."""
        return {
            "samples_per_s": round(statistics.median(self.wall[1:])),
            "samples_per_cpu_s": round(statistics.median(self.cpu[1:])),
            "samples_per_s_repeats": [round(value) for value in self.wall[1:]],
            "samples_per_cpu_s_repeats": [round(value) for value in self.cpu[1:]],
        }


def measure(directory: Path, layout: str, args: argparse.Namespace) -> dict[str, Any]:
    """Write one data set and time both readers on it alternately."""
    members = LAYOUTS[layout]
    fingerprint = {} if args.format == 1 else declare(members)
    samples = make_samples(members, args.num_samples)
    commit = write_shard(samples, str(directory), 0, failures={}, fingerprint=fingerprint)
    write_manifest(str(directory), fingerprint)
    reader = ShardReader(str(directory))
    timings = {
        name: Timings() for name in ("d2i", "webdataset", "first_checked", "first_unchecked")
    }
    for seed in range(args.repeats + 1):
        timings["d2i"].add(read_d2i, reader, members, args.batch, seed)
        timings["webdataset"].add(read_webdataset, directory / commit.tar_name)
        for name, check_data in (("first_checked", True), ("first_unchecked", False)):
            first = partial(read_first, check_data=check_data)
            timings[name].add(first, directory, members, args.batch, seed)
    found = {name: timing.figures() for name, timing in timings.items()}
    ratios = {
        f"ratio_of_{unit}": round(found["d2i"][unit] / found["webdataset"][unit], 1)
        for unit in ("samples_per_s", "samples_per_cpu_s")
    }
    checked, unchecked = (found[f"first_{how}"]["samples_per_cpu_s"] for how in _HOW)
    ratios["time_of_first_read_by_checksums"] = round(unchecked / checked, 2)
    size_bytes = sum(2 * int(np.prod(SHAPES[name])) for name in members)
    return {"sample_size_bytes": size_bytes, **ratios, **found}


def main() -> None:
    """Measure both layouts and print the line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--num-samples", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--format", type=int, choices=(1, 2), default=1)
    args = parser.parse_args()
    result: dict[str, Any] = {"benchmark": "shard_reader", **vars(args)}
    for layout in LAYOUTS:
        with tempfile.TemporaryDirectory() as directory:
            result[layout] = measure(Path(directory), layout, args)
    result["machine"] = f"{platform.machine()}, Python {platform.python_version()}"
    print(json.dumps(result))


if __name__ == "__main__":
    main()
