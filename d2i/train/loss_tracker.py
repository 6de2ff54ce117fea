"""The losses of a run between two of its lines, kept from making the accelerator wait."""

from __future__ import annotations

import torch
from torch import Tensor

from d2i.train.ranks import Ranks


class LossTracker:
    """The losses since the last line: on the device until somebody asks for them.

    Args:
        ranks: Each has losses of its own.
        num_micro_batches: Of a step.
    """

    def __init__(self, ranks: Ranks, num_micro_batches: int) -> None:
        self._ranks, self._num_micro_batches = ranks, num_micro_batches
        self._waiting: list[Tensor] = []
        self.known: list[float] = []

    def add(self, loss: Tensor) -> None:
        """Take in the loss of a micro batch, without waiting for it."""
        self._waiting.append(loss.detach())

    def collect(self) -> tuple[list[float], list[tuple[int, int, int]]]:
        """Make the waiting losses known; every rank must call this.

        Returns:
            The loss of each step that was not known yet, its mean over ranks and micro batches;
            and (number of the step, rank, micro batch) of each loss that is no finite number.
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
