"""Stop signals: SIGTERM, or SIGUSR1, which SLURM sends before it takes a node away."""

from __future__ import annotations

import signal
from typing import Any

import torch

from d2i.train.distributed.ranks import Ranks

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopSignal:
    """Handles stop signals: at every step the ranks agree whether one of them received one.

    The answer is that of the step before, so that no step waits for it.

    Args:
        ranks: The ranks that must agree.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._is_requested = False
        self._pending: tuple[Any, torch.Tensor] | None = None
        for number in SIGNALS:
            signal.signal(number, self._request)
        # The entry point has blocked it until now.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})

    def _request(self, _number: int, _frame: object) -> None:
        self._is_requested = True

    def is_agreed(self) -> bool:
        """Return whether to stop; every rank must call this after every step."""
        answer = self._answer()
        requested = torch.tensor(int(self._is_requested))
        work = torch.distributed.all_reduce(requested, group=self._ranks.control, async_op=True)
        self._pending = (work, requested)
        return answer

    def close(self) -> None:
        """Wait for the last answer, which is unused, and ignore SIGUSR1 from now on.

        The signal may be repeated; the default action of SIGUSR1 would end this process in its
        last moments with a non-zero exit code.
        """
        self._answer()
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)

    def _answer(self) -> bool:
        if self._pending is None:
            return False
        work, requested = self._pending
        self._pending = None
        work.wait()
        return bool(requested.item())
