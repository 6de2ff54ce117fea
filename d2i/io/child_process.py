"""Child processes that do not outlive their parent or launcher."""

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
    """Ask the kernel to end this process when its parent dies, even by SIGKILL.

    For `preexec_fn`: a stage whose driver was killed must not go on writing beside the repeated
    command. Linux only; does nothing elsewhere.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def launcher_environment() -> dict[str, str]:
    """Return the environment variable that names this process as launcher to its descendants."""
    return {_STARTER: f"{os.getpid()}@{platform.node()}"}


def die_with_launcher() -> None:
    """End this process when the one that called `launcher_environment` is gone, if one did.

    For processes of a third-party launcher that does not forward signals. Linux only; does nothing
    elsewhere.
    """
    number, _, host = os.environ.get(_STARTER, "").partition("@")
    if host != platform.node() or sys.platform != "linux":
        return
    try:
        handle = os.pidfd_open(int(number))
    except ProcessLookupError:
        os._exit(128 + signal.SIGTERM)
    except OSError:
        # Old kernels and strict containers have no process handles.
        return
    threading.Thread(target=_end_after, args=(handle,), daemon=True).start()


def _end_after(handle: int) -> None:
    # A process handle becomes readable once the process has ended.
    select.select([handle], [], [])
    os._exit(128 + signal.SIGTERM)
