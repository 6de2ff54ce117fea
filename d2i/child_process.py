"""Child processes that do not outlive what started them."""

from __future__ import annotations

import ctypes
import os
import platform
import select
import signal
import sys
import threading

_PR_SET_PDEATHSIG = 1
_STARTER = "D2I_STARTER_PID"


def die_with_parent() -> None:
    """Ask the kernel to end this process when its parent dies, also by SIGKILL.

    For `preexec_fn`: a stage whose driver was killed must not go on writing beside the repeated
    command. Linux only; elsewhere it does nothing.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def launcher_environment() -> dict[str, str]:
    """Return what names this process as their starter to all that it starts, at any depth."""
    return {_STARTER: f"{os.getpid()}@{platform.node()}"}


def die_with_launcher() -> None:
    """End this process when the one that called `launcher_environment` is gone, if one did.

    For what a launcher of someone else's starts, which does not pass a signal on. Linux only;
    elsewhere it does nothing.
    """
    number, _, host = os.environ.get(_STARTER, "").partition("@")
    if host != platform.node() or sys.platform != "linux":
        return
    try:
        handle = os.pidfd_open(int(number))
    except ProcessLookupError:
        os._exit(128 + signal.SIGTERM)
    except OSError:
        # Old kernels and strict containers offer no process handles.
        return
    threading.Thread(target=_end_after, args=(handle,), daemon=True).start()


def _end_after(handle: int) -> None:
    # A process handle can be read once the process has ended.
    select.select([handle], [], [])
    os._exit(128 + signal.SIGTERM)
