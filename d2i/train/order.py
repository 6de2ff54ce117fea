"""The data order: which samples make up the global batch of a step.

A function of (seed, step) over the manifest alone: it knows no rank, thread or restart.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class DataOrder:
    """Epochs of seeded permutations, end to end: every sample exactly once an epoch."""

    num_samples: int
    seed: int

    def global_batch(self, step: int, size: int) -> NDArray[np.int64]:
        """Return the sample indices of one step, int64 (size,)."""
        positions = np.arange(step * size, (step + 1) * size)
        epochs, places = np.divmod(positions, self.num_samples)
        return np.array(
            [
                _permutation(self.num_samples, self.seed, int(e))[p]
                for e, p in zip(epochs, places, strict=True)
            ],
            dtype=np.int64,
        )

    def micro_batches(
        self, step: int, size: int, rank: int, world_size: int, num_micro_batches: int
    ) -> list[NDArray[np.int64]]:
        """Return one rank's part of a step's global batch, cut into equal micro batches."""
        mine = np.split(self.global_batch(step, size), world_size)[rank]
        return np.split(mine, num_micro_batches)


@lru_cache(maxsize=4)
def _permutation(num_samples: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, epoch, num_samples]).permutation(num_samples)
