"""Time that training waits for data of a slow store, with a cache of a quarter of the data set.

    python benchmarks/cold.py --num-samples 6000 --rate 1283 --store-mb-per-s 300

Writes 256 px samples with text latents in 24 shards, behind a store with a rate limit over all
requests and a delay before each. Reads batches in `blocked` order through `BatchLoader` (reading,
random draws, tensors) at `--rate` samples per second (1,283: U-ViT-S on one of eight A100 at 40 %
of their peak), and measures the time that it waits for them: with prefetch of shards and without.
The first window, whose wait cannot be hidden, is reported separately. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
from fsspec.implementations.local import LocalFileSystem

from d2i.config import TrainConfig
from d2i.models import family
from d2i.shards import Sample, ShardReader, json_bytes, npy_bytes, write_manifest, write_shard
from d2i.train.data.batch import BatchLoader
from d2i.train.data.data_order import DataOrder
from d2i.train.data.text_source import StoredText

SHAPES = {"moments": (8, 32, 32), "clip": (512,), "text": (77, 768)}
NUM_SHARDS, NUM_WINDOW_SHARDS = 24, 3
CHUNK_BYTES = 1 << 20


class SlowStore(LocalFileSystem):
    """Local files, with a rate limit over all concurrent reads."""

    protocol = "slow"
    bytes_per_s = 0.0
    delay_s = 0.0
    num_fetched_bytes = 0
    _free_at = 0.0
    _lock = threading.Lock()

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        stripped: str = super()._strip_protocol(path.removeprefix("slow://"))
        return stripped

    def get_file(self, rpath: str, lpath: str, **_: Any) -> None:
        """Copy a file chunk by chunk at the limited rate."""
        time.sleep(self.delay_s)
        with Path(self._strip_protocol(rpath)).open("rb") as source, Path(lpath).open("wb") as file:
            while chunk := source.read(CHUNK_BYTES):
                self._wait(len(chunk))
                file.write(chunk)

    @classmethod
    def _wait(cls, num_bytes: int) -> None:
        with cls._lock:
            cls._free_at = max(cls._free_at, time.perf_counter()) + num_bytes / cls.bytes_per_s
            cls.num_fetched_bytes += num_bytes
            left_s = cls._free_at - time.perf_counter()
        time.sleep(max(0.0, left_s))


def write_data(directory: Path, num_samples: int) -> None:
    """Write samples of random numbers at U-ViT-S's sizes."""
    random = np.random.default_rng(0)
    for shard, numbers in enumerate(np.array_split(np.arange(num_samples), NUM_SHARDS)):
        samples = []
        for number in numbers.tolist():
            encoded = {"json": json_bytes({"number": number})}
            for name, shape in SHAPES.items():
                encoded[f"{name}.npy"] = npy_bytes(random.standard_normal(shape).astype(np.float16))
            samples.append(Sample(f"train-{number}-0-0", encoded))
        write_shard(samples, str(directory), shard, failures={})
    (directory / "empty_text.npy").write_bytes(npy_bytes(np.zeros(SHAPES["text"], np.float16)))
    write_manifest(str(directory), {})


def measure(data: Path, cache: Path, args: argparse.Namespace, *, is_ahead: bool) -> dict[str, Any]:
    """Read batches at the given rate; return the share of time spent waiting."""
    size_bytes = sum(tar.stat().st_size for tar in data.glob("*.tar"))
    reader = ShardReader(f"slow://{data}", cache_dir=cache, cache_gb=size_bytes / 4 / 1e9)
    config = TrainConfig(
        num_steps=1, global_batch_size=args.batch, micro_batch_size=args.batch, order="blocked"
    )
    sizes = tuple(shard.num_samples for shard in reader.manifest.shards)
    order = DataOrder(sizes, 0, "blocked", NUM_WINDOW_SHARDS)
    num_steps = args.epochs * args.num_samples // args.batch
    SlowStore.num_fetched_bytes = 0
    waits, started = [], time.perf_counter()
    for wait_s in paced(reader, order, config, args, num_steps, is_ahead=is_ahead):
        waits.append(wait_s)
        if len(waits) == 1:
            started = time.perf_counter()
    elapsed_s = time.perf_counter() - started
    num_taken = (num_steps - 1) * args.batch
    return {
        "first_batch_s": round(waits[0], 2),
        "data_wait": round(sum(waits[1:]) / elapsed_s, 4),
        "longest_wait_s": round(max(waits[1:]), 3),
        "samples_per_s": round(num_taken / elapsed_s),
        "sets_fetched": round(SlowStore.num_fetched_bytes / size_bytes, 2),
    }


def paced(
    reader: ShardReader,
    order: DataOrder,
    config: TrainConfig,
    args: argparse.Namespace,
    num_steps: int,
    *,
    is_ahead: bool,
) -> Iterator[float]:
    """Yield the seconds that each step waits for its batch; steps are paced by `--rate`."""
    batches = BatchLoader(reader, config, family("uvit"), StoredText)
    requests = ((order.global_batch(step, args.batch), step) for step in range(num_steps))
    read_ahead = batches.read_ahead(requests)
    for step in range(num_steps):
        if is_ahead:
            reader.prefetch(order.shards_ahead(batches.first_unread(step), args.batch))
        asked = time.perf_counter()
        next(read_ahead)
        yield time.perf_counter() - asked
        time.sleep(args.batch / args.rate)
    batches.close()


def main() -> None:
    """Measure with and without prefetch, and print the line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--num-samples", type=int, default=6000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--rate", type=float, default=1283, help="samples per second")
    parser.add_argument("--store-mb-per-s", type=float, default=300)
    parser.add_argument("--store-delay-s", type=float, default=0.05)
    args = parser.parse_args()
    fsspec.register_implementation("slow", SlowStore, clobber=True)
    SlowStore.bytes_per_s, SlowStore.delay_s = args.store_mb_per_s * 1e6, args.store_delay_s
    result: dict[str, Any] = {"benchmark": "cold", **vars(args)}
    with tempfile.TemporaryDirectory() as name:
        data = Path(name) / "data"
        write_data(data, args.num_samples)
        for part, is_ahead in (("ahead", True), ("on_demand", False)):
            result[part] = measure(data, Path(name) / part, args, is_ahead=is_ahead)
    result["machine"] = f"{platform.machine()}, Python {platform.python_version()}"
    print(json.dumps(result))


if __name__ == "__main__":
    main()
