"""Ranks that fail in several ways, and the error that each reports: for `test_failures.py`.

    python -m tests.integration.failures_program OUT

Writes `OUT/WAY-RANK.json`, the error line of a rank or null; a rank that dies writes no file.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from d2i.errors import ConfigError, D2IError
from d2i.recipes import demo
from d2i.train.distributed.ranks import Ranks
from d2i.train.failures import report_error, reported_errors
from d2i.train.request import TrainRequest
from tests.processes import free_port

NUM_RANKS = 3


def fail() -> int:
    raise ConfigError("it is wrong")


def on_the_first(ranks: Ranks) -> None:
    """The first rank fails on behalf of all."""
    ranks.run_on_rank_zero(fail)


def on_all(_ranks: Ranks) -> None:
    """Every rank fails."""
    fail()


def on_one(ranks: Ranks) -> None:
    """One other rank fails alone."""
    if ranks.rank == 1:
        fail()


def full_disks(ranks: Ranks) -> None:
    """Two other ranks fail, each with its own error."""
    if ranks.rank:
        raise OSError(errno.ENOSPC, "No space left on device", f"/disk-{ranks.rank}")


def killed_one(ranks: Ranks) -> None:
    """One other rank dies."""
    if ranks.rank == 2:
        os.kill(os.getpid(), signal.SIGKILL)


def killed_first(ranks: Ranks) -> None:
    """The first rank dies, and with it the store that the ranks communicate through."""
    if ranks.is_rank_zero:
        os.kill(os.getpid(), signal.SIGKILL)


WAYS: tuple[Callable[[Ranks], None], ...] = (
    on_the_first,
    on_all,
    on_one,
    full_disks,
    killed_one,
    killed_first,
)


def run_rank(way: Callable[[Ranks], None], rank: int, port: int, out: Path) -> None:
    """Join the other ranks, fail in a way, and write the reported error."""
    os.environ["RANK"] = str(rank)
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=NUM_RANKS
    )
    control = torch.distributed.new_group(backend="gloo")
    ranks = Ranks(rank, NUM_RANKS, torch.device("cpu"), control)
    request = TrainRequest(demo(), "data", str(out / "run"))
    try:
        with reported_errors(request, ranks):
            way(ranks)
            ranks.barrier()
    except D2IError as err:
        (out / f"{way.__name__}-{rank}.json").write_text(json.dumps(report_error(err)))


def main() -> None:
    """Run all ways at once, each rank in a fork of this process."""
    out, children = Path(sys.argv[1]), []
    os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"
    for way in WAYS:
        port = free_port()
        for rank in range(NUM_RANKS):
            child = os.fork()
            if not child:
                run_rank(way, rank, port, out)
                os._exit(0)
            children.append(child)
    for child in children:
        os.waitpid(child, 0)


if __name__ == "__main__":
    main()
