"""One thread for torch on a CPU, so that sums are taken in one order on every machine."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch

# torch counts threads for the whole process, at least in part.
_LOCK = threading.RLock()


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread, and restore the process's number of threads.

    Threads of one process enter one after the other.
    """
    with _LOCK:
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(before)
