"""The ranks of a job, and their small control messages beside the gradients."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from d2i.errors import D2IError

_HOST_LENGTH = 255
_FAILED = -1
_REPORT_CLAIMED = "told"
_WAIT_S, _POLL_S = 3.0, 0.1
Answer = TypeVar("Answer")
Built = TypeVar("Built")


class AlreadyReportedError(D2IError):
    """Another rank reports why the training ends."""


@dataclass(frozen=True)
class Ranks:
    """This rank, and its collectives with the others.

    Args:
        rank: This rank's number, from 0.
        world_size: Number of ranks.
        device: The device of its network.
        control: A gloo group of all ranks, for messages that must not wait for an accelerator.
    """

    rank: int
    world_size: int
    device: torch.device
    control: Any

    @property
    def is_rank_zero(self) -> bool:
        """True if this rank is the one that prints and writes the run's logs."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until every rank has called this."""
        torch.distributed.barrier(group=self.control)

    def broadcast_from_rank_zero(self, number: int) -> int:
        """Return the first rank's number on every rank."""
        reported = torch.tensor(number, dtype=torch.int64)
        torch.distributed.broadcast(reported, src=0, group=self.control)
        return int(reported)

    def sum(self, values: Tensor) -> Tensor:
        """Sum a CPU tensor over all ranks; every rank must call this."""
        total = values.clone()
        torch.distributed.all_reduce(total, group=self.control)
        return total

    def gather(self, values: Tensor) -> Tensor:
        """Gather an equally shaped CPU tensor from every rank: (world_size, ...)."""
        parts = [torch.empty_like(values) for _ in range(self.world_size)]
        torch.distributed.all_gather(parts, values, group=self.control)
        return torch.stack(parts)

    def run_on_rank_zero(self, work: Callable[[], int]) -> int:
        """Run work on the first rank and return its result on every rank; all must call this.

        Args:
            work: Returns a number from 0.

        Raises:
            AlreadyReportedError: On the other ranks, if the work failed; the first rank raises the
                work's own error.
        """
        number, problem = _FAILED, None
        if self.is_rank_zero:
            try:
                number = work()
            except Exception as err:
                problem = err
        number = self.broadcast_from_rank_zero(number)
        if problem:
            raise problem
        if number == _FAILED:
            raise AlreadyReportedError
        return number

    def build_on_rank_zero(self, build: Callable[[], Built]) -> Built | None:
        """Build an object on rank 0 alone; None on the others. Raises as `run_on_rank_zero`."""
        built: list[Built] = []

        def work() -> int:
            built.append(build())
            return 0

        self.run_on_rank_zero(work)
        return built[0] if built else None

    def claim_report(self) -> bool | None:
        """Claim the error report; return True if this rank is the first to claim it.

        None if the store is gone, together with the first rank, which holds it.
        """
        return _query_store(lambda store: store.add(_REPORT_CLAIMED, 1) == 1)

    def is_reported(self, wait_s: float = _WAIT_S) -> bool | None:
        """Return whether a rank claims the report within `wait_s`; None if the store is gone."""
        deadline = time.monotonic() + wait_s
        while not (reported := _query_store(lambda store: store.check([_REPORT_CLAIMED]))):
            if reported is None or time.monotonic() > deadline:
                return reported
            time.sleep(_POLL_S)
        return True

    def missing_ranks(self, wait_s: float = _WAIT_S) -> list[int]:
        """Return the ranks that no longer respond, after a collective has failed.

        Those still alive report to the rendezvous store, which the first rank holds; if the store
        is gone, so is the first rank.
        """

        def missing(store: Any) -> list[int]:
            store.set(str(self.rank), "here")
            time.sleep(wait_s)
            return [r for r in range(self.world_size) if not store.check([str(r)])]

        ended = _query_store(missing)
        return [0] if ended is None else ended

    def hosts(self) -> list[str]:
        """Return the host of every rank, by rank; every rank must call this."""
        name = platform.node().encode()[:_HOST_LENGTH]
        padded = torch.zeros(_HOST_LENGTH, dtype=torch.uint8)
        padded[: len(name)] = torch.tensor(list(name), dtype=torch.uint8)
        return [bytes(row.tolist()).rstrip(b"\0").decode() for row in self.gather(padded)]


def _query_store(question: Callable[[Any], Answer]) -> Answer | None:
    """Query the rendezvous store of the ranks; None if it is gone."""
    c10d: Any = torch.distributed.distributed_c10d
    try:
        return question(c10d.PrefixStore("d2i.here", c10d._get_default_store()))
    except (RuntimeError, torch.distributed.DistError):
        return None
