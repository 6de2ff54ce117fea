"""The losses between two metrics lines, collected without stalling the accelerator."""

from __future__ import annotations

import torch
from torch import Tensor

from d2i.config import TrainConfig
from d2i.train.data.loader import BatchStream
from d2i.train.distributed.ranks import Ranks
from d2i.train.failures import check_finite


class LossTracker:
    """The losses since the last metrics line; they stay on the device until `collect`.

    Args:
        ranks: All ranks; each has its own losses.
        batches: The batches that the losses are of.
        config: The settings to advise on if a loss is not finite.
        known: Losses since the last line from before an interruption.
    """

    def __init__(
        self, ranks: Ranks, batches: BatchStream, config: TrainConfig, known: tuple[float, ...]
    ) -> None:
        self._ranks, self._batches, self._config = ranks, batches, config
        self._waiting: list[Tensor] = []
        self.known = list(known)
        """The loss of each step since the last line, once it is collected."""

    def add(self, loss: Tensor) -> None:
        """Add the loss of a micro batch, without waiting for its value."""
        self._waiting.append(loss.detach())

    def take(self, step: int) -> list[float]:
        """Return the loss of each step since the last line, up to a step, and begin a new line.

        Every rank must call this.

        Raises:
            DivergedError: As `collect` does.
        """
        self.collect(step)
        losses, self.known = self.known, []
        return losses

    def collect(self, step: int) -> None:
        """Gather the losses up to a step from all ranks into `known`; every rank must call this.

        The loss of a step is the mean over its ranks and micro batches.

        Raises:
            DivergedError: If one is not finite, with the keys of its samples.
        """
        if not self._waiting:
            return
        num_micro_batches = self._batches.num_micro_batches
        mine = torch.stack(self._waiting).double().cpu().view(-1, num_micro_batches)
        self._waiting = []
        of_all = self._ranks.gather(mine)
        losses: list[float] = of_all.mean(dim=(0, 2)).tolist()
        self.known += losses
        first = step - len(losses) + 1
        keys: dict[int, list[str]] = {}
        for rank, number, micro_batch in (~of_all.isfinite()).nonzero().tolist():
            # Steps are counted from 0 by the batches, and from 1 in what is logged.
            found = self._batches.keys(first + number - 1, rank, micro_batch)
            keys.setdefault(first + number, []).extend(found)
        check_finite(losses, first, keys, self._config)
