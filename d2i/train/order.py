"""The data order: which samples make up the global batch of a step.

A function of (seed, step) over the manifest alone: it knows no rank, thread or restart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class DataOrder:
    """Epochs of seeded orders, end to end: every sample exactly once an epoch.

    Args:
        shard_sizes: Samples of each shard, in the order of the reader.
        seed: Another seed, another order.
        kind: `global` is a permutation of all samples. `blocked` shuffles the shards, and then
            the samples within every `num_window_shards` of them: what a cache must hold at once.
        num_window_shards: Shards of a window.
    """

    shard_sizes: tuple[int, ...]
    seed: int
    kind: Literal["global", "blocked"] = "global"
    num_window_shards: int = 1

    @property
    def num_samples(self) -> int:
        """Samples of an epoch."""
        return sum(self.shard_sizes)

    def global_batch(self, step: int, size: int) -> NDArray[np.int64]:
        """Return the sample indices of one step, int64 (size,)."""
        start, end, num_samples = step * size, (step + 1) * size, self.num_samples
        parts = []
        for epoch in range(start // num_samples, (end - 1) // num_samples + 1):
            first = epoch * num_samples
            low, high = max(start - first, 0), min(end - first, num_samples)
            parts.append(self.epoch(epoch)[low:high])
        return np.concatenate(parts)

    def epoch(self, epoch: int) -> NDArray[np.int64]:
        """Return all samples in the order of an epoch, int64 (num_samples,), read-only."""
        if self.kind == "global":
            return _permutation(self.num_samples, self.seed, epoch)
        return _blocked(self.shard_sizes, self.num_window_shards, self.seed, epoch)

    def micro_batches(
        self, step: int, size: int, rank: int, world_size: int, num_micro_batches: int
    ) -> list[NDArray[np.int64]]:
        """Return one rank's part of a step's global batch, cut into equal micro batches."""
        mine = np.split(self.global_batch(step, size), world_size)[rank]
        return np.split(mine, num_micro_batches)


@lru_cache(maxsize=2)
def _permutation(num_samples: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return _frozen(np.random.default_rng([seed, epoch, num_samples]).permutation(num_samples))


@lru_cache(maxsize=2)
def _blocked(
    shard_sizes: Sequence[int], num_window_shards: int, seed: int, epoch: int
) -> NDArray[np.int64]:
    random = np.random.default_rng([seed, epoch, sum(shard_sizes), len(shard_sizes)])
    starts = np.concatenate([[0], np.cumsum(shard_sizes)])
    shards = random.permutation(len(shard_sizes))
    windows = []
    for first in range(0, len(shards), num_window_shards):
        chosen = shards[first : first + num_window_shards]
        samples = np.concatenate([np.arange(starts[s], starts[s + 1]) for s in chosen])
        windows.append(random.permutation(samples))
    return _frozen(np.concatenate(windows).astype(np.int64))


def _frozen(order: NDArray[np.int64]) -> NDArray[np.int64]:
    order.flags.writeable = False
    return order
