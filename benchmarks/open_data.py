"""Time and memory to open a large data set.

Writes a data set of small samples, or takes an existing one, and opens it in a separate process:
manifest, length, and one batch of random indices. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from d2i.shards import Sample, ShardReader, json_bytes, npy_bytes, write_manifest, write_shard


def make_data(directory: Path, num_samples: int, num_per_shard: int) -> None:
    """Write samples that hold only token ids."""
    tokens = npy_bytes(np.arange(77, dtype=np.uint16))
    for index, start in enumerate(range(0, num_samples, num_per_shard)):
        samples = (
            Sample(
                f"train-{number:08d}-0-0",
                {"json": json_bytes({"n": number}), "tokens.npy": tokens},
            )
            for number in range(start, min(start + num_per_shard, num_samples))
        )
        write_shard(samples, str(directory), index, failures={})
    write_manifest(str(directory), {})


def peak_mb() -> float:
    """Return the peak memory of this process, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


def measure(directory: str) -> dict[str, float]:
    """Open a data set; return seconds and MB, and what the first batch adds to them."""
    before = peak_mb()
    start = time.perf_counter()
    reader = ShardReader(directory)
    num = len(reader)
    opened, opened_mb = time.perf_counter() - start, peak_mb()
    reader.read(np.random.default_rng(0).integers(0, num, 512))
    return {
        "num_samples": num,
        "num_shards": len(reader.manifest.shards),
        "open_s": round(opened, 3),
        "first_batch_of_512_s": round(time.perf_counter() - start - opened, 3),
        "process_mb_before": round(before),
        "process_mb_opened": round(opened_mb),
        "process_mb_after_batch": round(peak_mb()),
    }


def main() -> None:
    """Write the data set, measure, and print the line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--num-samples", type=int, default=1_000_000)
    parser.add_argument("--num-per-shard", type=int, default=1000)
    parser.add_argument("--data", help="an existing data set; none is written")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.data)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        directory = args.data or scratch
        if not args.data:
            make_data(Path(directory), args.num_samples, args.num_per_shard)
        command = [sys.executable, __file__, "--measure", "--data", directory]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    machine = f"{platform.machine()}, Python {platform.python_version()}"
    print(json.dumps({"benchmark": "open_data", **json.loads(done.stdout), "machine": machine}))


if __name__ == "__main__":
    main()
