"""The losses between two metrics lines, collected without stalling the accelerator."""

from __future__ import annotations

import torch
from torch import Tensor

from d2i.train.distributed.ranks import Ranks


class LossTracker:
    """Collects the losses since the last metrics line; they stay on the device until `collect`.

    Args:
        ranks: All ranks; each has its own losses.
        num_micro_batches: Number of micro batches in a step.
    """

    def __init__(self, ranks: Ranks, num_micro_batches: int) -> None:
        self._ranks, self._num_micro_batches = ranks, num_micro_batches
        self._waiting: list[Tensor] = []
        self.known: list[float] = []

    def add(self, loss: Tensor) -> None:
        """Add the loss of a micro batch, without waiting for its value."""
        self._waiting.append(loss.detach())

    def collect(self) -> tuple[list[float], list[tuple[int, int, int]]]:
        """Gather the waiting losses from all ranks; every rank must call this.

        Returns:
            The loss of each new step, its mean over ranks and micro batches; and (step as an index
            into these losses, rank, micro batch) of each loss that is not finite.
        """
        if not self._waiting:
            return [], []
        mine = torch.stack(self._waiting).double().cpu().view(-1, self._num_micro_batches)
        self._waiting = []
        of_all = self._ranks.gather(mine)
        losses: list[float] = of_all.mean(dim=(0, 2)).tolist()
        self.known += losses
        places = (~of_all.isfinite()).nonzero().tolist()
        return losses, [(step, rank, micro) for rank, step, micro in places]
