"""The wish to stop is heard whenever it comes, also before there is a step to end with."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
import torch

from d2i.train.ranks import Ranks
from d2i.train.stop_signal import SIGNALS, StopSignal


@pytest.fixture
def alone() -> Iterator[Ranks]:
    """A job of one rank, and this process's signals as they were afterwards."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield Ranks(0, 1, torch.device("cpu"), torch.distributed.group.WORLD)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
    torch.distributed.destroy_process_group()
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_wish_that_came_during_start_up_ends_the_first_step(alone: Ranks) -> None:
    # As the entry point does before torch is imported.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)
    stop = StopSignal(alone)
    assert not stop.is_agreed(), "the answer is one step old"
    assert stop.is_agreed()
    stop.close()


def test_without_a_wish_nothing_stops(alone: Ranks) -> None:
    stop = StopSignal(alone)
    assert [stop.is_agreed() for _ in range(3)] == [False] * 3
    stop.close()


RANKS = "import signal; print('begun', flush=True); signal.sigwait({signal.SIGUSR1})"
COMMAND = f"""
import sys
from d2i.train.launcher import run_command
print(*run_command([sys.executable, "-c", "import signal; "
    "signal.pthread_sigmask(signal.SIG_BLOCK, {{signal.SIGUSR1}}); {RANKS}"]))
"""


@pytest.mark.parametrize(
    ("number", "was_interrupted"), [(signal.SIGINT, True), (signal.SIGTERM, False)]
)
def test_ctrl_c_alone_is_told_apart(number: signal.Signals, *, was_interrupted: bool) -> None:
    """Both ask the ranks to stop; after Ctrl-C a shell is not to go on."""
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, "-c", COMMAND], stdout=pipe, stderr=pipe, text=True
    ) as process:
        assert process.stderr and process.stderr.readline() == "begun\n"
        process.send_signal(number)
        said, _ = process.communicate(timeout=100)
    assert said == f"0 {was_interrupted}\n"
