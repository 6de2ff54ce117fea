"""Stop signals are honoured whenever they arrive, even before the first training step."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
import torch

from d2i.train.distributed.ranks import Ranks
from d2i.train.stop_signal import SIGNALS, StopSignal


@pytest.fixture
def single_rank() -> Iterator[Ranks]:
    """Return a job of one rank, and restore the signal handlers of this process afterwards."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield Ranks(0, 1, torch.device("cpu"), torch.distributed.group.WORLD)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
    torch.distributed.destroy_process_group()
    for number, handler in before.items():
        signal.signal(number, handler)


def test_stop_signal_during_startup_stops_after_first_step(single_rank: Ranks) -> None:
    # The entry point blocks the signal like this before it imports torch.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)
    stop = StopSignal(single_rank)
    assert not stop.is_agreed(), "the answer is one step old"
    assert stop.is_agreed()
    stop.close()


def test_stop_is_not_agreed_without_signal(single_rank: Ranks) -> None:
    stop = StopSignal(single_rank)
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
def test_run_command_distinguishes_sigint_from_sigterm(
    number: signal.Signals, *, was_interrupted: bool
) -> None:
    """Both signals stop the ranks; after Ctrl-C a shell script must not continue."""
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, "-c", COMMAND], stdout=pipe, stderr=pipe, text=True
    ) as process:
        assert process.stderr and process.stderr.readline() == "begun\n"
        process.send_signal(number)
        stdout, _ = process.communicate(timeout=100)
    assert stdout == f"0 {was_interrupted}\n"
