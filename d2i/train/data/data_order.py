"""The data order: the samples of each step's global batch, shuffled by a seed.

It depends on the seed, the step and the shard sizes alone, not on ranks, threads or restarts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class DataOrder:
    """A seeded shuffle of every epoch, one after the other: each sample exactly once an epoch.

    Args:
        shard_sizes: Number of samples of each shard, in the order of the reader.
        seed: Seed of the shuffle.
        kind: `global` permutes all samples. `blocked` shuffles the shards, and then the samples
            within each window of `num_window_shards` shards, which a cache must hold at once.
        num_window_shards: Number of shards in a window.
    """

    shard_sizes: tuple[int, ...]
    seed: int
    kind: Literal["global", "blocked"] = "global"
    num_window_shards: int = 1

    @cached_property
    def num_samples(self) -> int:
        """Number of samples in an epoch."""
        return sum(self.shard_sizes)

    def global_batch(self, step: int, size: int) -> NDArray[np.int64]:
        """Return the sample indices of one step, int64 (size,)."""
        start, end, num_samples = step * size, (step + 1) * size, self.num_samples
        parts = []
        for epoch in range(start // num_samples, (end - 1) // num_samples + 1):
            first = epoch * num_samples
            low, high = max(start - first, 0), min(end - first, num_samples)
            parts.append(self.epoch(epoch)[low:high])
        return np.concatenate(parts).astype(np.int64)

    def epoch(self, epoch: int) -> NDArray[np.uint32]:
        """Return all sample indices in the order of an epoch, uint32 (num_samples,), read-only."""
        if self.kind == "global":
            return _shuffled(self.num_samples, self.seed, epoch)
        return _block_shuffled(self.shard_sizes, self.num_window_shards, self.seed, epoch)

    def shards_ahead(self, step: int, size: int) -> tuple[int, ...]:
        """Return the shards to prefetch for a step and the next ones, in the order of use.

        With `blocked` these are the windows of the step's samples and the next window; with
        `global` all shards, since any step may need any of them.
        """
        if self.kind == "global":
            return tuple(range(len(self.shard_sizes)))
        first, last = step * size, (step + 1) * size - 1
        epochs = range(first // self.num_samples, last // self.num_samples + 2)
        found = [
            _window_ends(self.shard_sizes, self.num_window_shards, self.seed, e) for e in epochs
        ]
        windows = [window for of_epoch, _ in found for window in of_epoch]
        ends = [
            e * self.num_samples + of_epoch for e, (_, of_epoch) in zip(epochs, found, strict=True)
        ]
        start, stop = np.searchsorted(np.concatenate(ends), [first, last], side="right")
        wanted = (int(shard) for window in windows[start : stop + 2] for shard in window)
        return tuple(dict.fromkeys(wanted))

    def num_window_bytes(self, shard_bytes: Sequence[int]) -> int:
        """Return the largest total size of shards read at once, given the size of each shard."""
        num_shards = len(shard_bytes) if self.kind == "global" else self.num_window_shards
        return sum(sorted(shard_bytes)[-num_shards:])

    def micro_batches(
        self, step: int, size: int, rank: int, world_size: int, num_micro_batches: int
    ) -> list[NDArray[np.int64]]:
        """Return one rank's part of a step's global batch, split into equal micro batches."""
        mine = np.split(self.global_batch(step, size), world_size)[rank]
        return np.split(mine, num_micro_batches)


# Only one epoch is cached, at 4 bytes a sample: a step that ends an epoch begins the next one.
@lru_cache(maxsize=1)
def _shuffled(num_samples: int, seed: int, epoch: int) -> NDArray[np.uint32]:
    order = np.arange(num_samples, dtype=np.uint32)
    np.random.default_rng([seed, epoch, num_samples]).shuffle(order)
    return _frozen(order)


@lru_cache(maxsize=1)
def _block_shuffled(
    shard_sizes: Sequence[int], num_window_shards: int, seed: int, epoch: int
) -> NDArray[np.uint32]:
    windows, random = _windows(shard_sizes, num_window_shards, seed, epoch)
    stops = np.cumsum(shard_sizes)
    order = np.empty(stops[-1], np.uint32)
    begin = 0
    for window in windows:
        parts = [np.arange(stops[s] - shard_sizes[s], stops[s]) for s in window]
        num = sum(map(len, parts))
        order[begin : begin + num] = random.permutation(np.concatenate(parts))
        begin += num
    return _frozen(order)


@lru_cache(maxsize=4)
def _window_ends(
    shard_sizes: Sequence[int], num_window_shards: int, seed: int, epoch: int
) -> tuple[tuple[NDArray[np.int64], ...], NDArray[np.int64]]:
    """Return the shards of each window of an epoch, and the sample at which each window ends."""
    windows, _ = _windows(shard_sizes, num_window_shards, seed, epoch)
    sizes = np.array(shard_sizes)
    return windows, np.cumsum([sizes[window].sum() for window in windows])


def _windows(
    shard_sizes: Sequence[int], num_window_shards: int, seed: int, epoch: int
) -> tuple[tuple[NDArray[np.int64], ...], np.random.Generator]:
    """Return the shards of each window of an epoch, and the generator to shuffle their samples."""
    random = np.random.default_rng([seed, epoch, sum(shard_sizes), len(shard_sizes)])
    shards = random.permutation(len(shard_sizes))
    firsts = range(0, len(shards), num_window_shards)
    return tuple(shards[first : first + num_window_shards] for first in firsts), random


def _frozen(order: NDArray[np.uint32]) -> NDArray[np.uint32]:
    order.flags.writeable = False
    return order
