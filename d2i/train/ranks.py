"""The ranks of a job: what they tell each other beside the gradients, in small numbers."""

from __future__ import annotations

import platform
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_HOST_LENGTH = 255


@dataclass(frozen=True)
class Ranks:
    """This rank among the others.

    Args:
        rank: This rank's number, from 0.
        world_size: How many there are.
        device: Where its network lies.
        control: A gloo group of all ranks, for what must not wait for an accelerator.
    """

    rank: int
    world_size: int
    device: torch.device
    control: Any

    @property
    def is_first(self) -> bool:
        """Whether this rank is the one that prints and keeps the run's records."""
        return self.rank == 0

    def wait_for_all(self) -> None:
        """Return once every rank has come here."""
        torch.distributed.barrier(group=self.control)

    def from_first(self, number: int) -> int:
        """Return the first rank's number on every rank."""
        told = torch.tensor(number, dtype=torch.int64)
        torch.distributed.broadcast(told, src=0, group=self.control)
        return int(told)

    def sum(self, values: Tensor) -> Tensor:
        """Add a CPU tensor up over all ranks."""
        total = values.clone()
        torch.distributed.all_reduce(total, group=self.control)
        return total

    def gather(self, values: Tensor) -> Tensor:
        """Collect an equally shaped CPU tensor of every rank: (world_size, ...)."""
        parts = [torch.empty_like(values) for _ in range(self.world_size)]
        torch.distributed.all_gather(parts, values, group=self.control)
        return torch.stack(parts)

    def who_is_gone(self, wait_s: float = 3.0) -> list[int]:
        """After a call to the others has failed: which ranks do not answer any more.

        Those still there report to the store that brought them together, which the first rank
        holds; without it the first rank itself is gone.
        """
        store = _reports()
        try:
            store.set(str(self.rank), "here")
            time.sleep(wait_s)
            return [r for r in range(self.world_size) if not store.check([str(r)])]
        except (RuntimeError, torch.distributed.DistError):
            return [0]

    def hosts(self) -> list[str]:
        """Return the host of every rank, by rank; every rank must call this."""
        name = platform.node().encode()[:_HOST_LENGTH]
        padded = torch.zeros(_HOST_LENGTH, dtype=torch.uint8)
        padded[: len(name)] = torch.tensor(list(name), dtype=torch.uint8)
        return [bytes(row.tolist()).rstrip(b"\0").decode() for row in self.gather(padded)]


def _reports() -> Any:
    c10d: Any = torch.distributed.distributed_c10d
    return c10d.PrefixStore("d2i.here", c10d._get_default_store())
