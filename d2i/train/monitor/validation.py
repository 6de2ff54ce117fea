"""The validation loss on fixed samples, noise and times, by band of model time.

It is computed with the trained weights, as the training loss is, not with their averages (EMA).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from d2i.config import NUM_NOISE_LEVELS, TrainConfig
from d2i.models.base import Family
from d2i.run_dir import ValidationLine
from d2i.train.data.batch import BatchLoader
from d2i.train.distributed.ranks import Ranks
from d2i.train.objective import Objective

_PURPOSE = "valid."
_NUM_BANDS = 4
_BAND_LENGTH = NUM_NOISE_LEVELS // _NUM_BANDS


def choose_instances(num_samples: int, num_wanted: int, seed: int) -> NDArray[np.int64]:
    """Choose validation samples, always the same for a seed: int64 (at most num_wanted,)."""
    return np.random.default_rng([seed, num_samples]).permutation(num_samples)[:num_wanted]


class Validation:
    """Computes the loss of fixed samples, divided among the ranks.

    Args:
        batches: Reader of the validation shards.
        num_samples: Number of samples in them.
        config: The number of samples to use, and the seed.
        family: The family of the network, which knows the model times.
        objective: The loss of each sample.
        ranks: The ranks that share the work.
    """

    def __init__(
        self,
        batches: BatchLoader,
        num_samples: int,
        config: TrainConfig,
        family: Family,
        objective: Objective,
        ranks: Ranks,
    ) -> None:
        self._batches, self._objective, self._ranks = batches, objective, ranks
        self._family = family
        micro_batch_size, _ = config.accumulation(ranks.world_size)
        chosen = choose_instances(num_samples, config.num_validation_samples, config.seed)
        # Every rank runs the network equally often; rows that pad the last batches do not count.
        num_rows = ranks.world_size * micro_batch_size
        padding = np.full(-len(chosen) % num_rows, -1)
        mine = np.concatenate([chosen, padding]).reshape(-1, ranks.world_size, micro_batch_size)
        self._rows: list[NDArray[np.int64]] = list(mine[:, ranks.rank])
        self._filler = int(chosen[0])

    @torch.no_grad()
    def loss(self, engine: Any, step: int) -> ValidationLine:
        """Compute the loss with the current weights; every rank must call this."""
        engine.eval()
        totals = torch.zeros(_NUM_BANDS, 2, dtype=torch.float64)
        for rows in self._rows:
            totals += self._totals(engine, rows)
        engine.train()
        summed = self._ranks.sum(totals)
        loss, count = summed.sum(0).tolist()
        return ValidationLine(step, loss / count, _by_band(summed))

    def _totals(self, engine: Any, rows: NDArray[np.int64]) -> Tensor:
        """Return the sum and count of the losses in each band, float64 (bands, 2)."""
        batch = self._batches.read(np.where(rows < 0, self._filler, rows), 0, _PURPOSE)
        losses = self._objective(engine, batch.to(self._ranks.device)).double().cpu()
        is_real = torch.from_numpy(rows >= 0)
        band = (self._family.model_times(batch.draw) - 1) // _BAND_LENGTH
        totals = torch.zeros(_NUM_BANDS, 2, dtype=torch.float64)
        totals[:, 0].index_add_(0, band[is_real], losses[is_real])
        totals[:, 1].index_add_(0, band[is_real], torch.ones_like(losses[is_real]))
        return totals


def _by_band(totals: Tensor) -> dict[str, float]:
    return {
        f"{number * _BAND_LENGTH + 1}-{(number + 1) * _BAND_LENGTH}": loss / count
        for number, (loss, count) in enumerate(totals.tolist())
        if count
    }
