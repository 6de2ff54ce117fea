"""The `deepspeed` line that `d2i train` prints and runs."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import d2i
from d2i.errors import ClusterError
from d2i.io.child_process import die_with_parent, launcher_environment

_POLL_S = 1.0
# DeepSpeed's launcher kills ranks that take more than 30 seconds to end.
_GROUP_WAIT_S, _GROUP_POLL_S = 60.0, 0.05


def deepspeed_command(arguments: Sequence[str], num_accelerators: int | None) -> list[str]:
    """Return the command line: `deepspeed … train/launch.py ARGUMENTS`.

    Without a checkout (an installed wheel) the same entry is `--module d2i.train.launch`.

    Args:
        arguments: Arguments of `train/launch.py`.
        num_accelerators: Ranks on this machine; `None` means every GPU, or one CPU rank.

    Raises:
        ClusterError: If the launcher is not installed beside this Python.
    """
    launcher = Path(sys.executable).with_name("deepspeed")
    if not launcher.exists():
        raise ClusterError(
            f"no deepspeed launcher beside {sys.executable}; expected it in the same "
            'environment; run pip install "d2i[all]"'
        )
    script = Path(d2i.__file__).parents[1] / "train" / "launch.py"
    entry = [str(script)] if script.exists() else ["--module", "d2i.train.launch"]
    ranks = [] if num_accelerators is None else ["--num_accelerators", str(num_accelerators)]
    # Its log would bury the one line that explains why a training ends.
    quiet = ["--log_level", "error"]
    return [str(launcher), *quiet, "--master_port", str(_free_port()), *ranks, *entry, *arguments]


def run_command(command: Sequence[str]) -> tuple[int, bool]:
    """Run the launcher in its own process group, which ends when this process does.

    The launcher's output goes to stderr; stdout is for the command's own result.

    Returns:
        Its exit code, and True if Ctrl-C was pressed to stop the ranks.
    """
    environment = (
        os.environ
        | launcher_environment()
        | {
            # Lets the launcher find ninja and python even if the environment is not activated.
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
            "TOKENIZERS_PARALLELISM": "false",
        }
    )
    with subprocess.Popen(
        list(command),
        env=environment,
        # A library on a rank must not wait at a prompt that nobody answers.
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr,
        start_new_session=True,
        preexec_fn=_before_launcher,
    ) as launcher:
        stop = _Stop(launcher.pid)
        try:
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    code = launcher.wait(timeout=_POLL_S)
                    stop.wait_for_group()
                    return code, stop.is_interrupted
                stop.repeat()
        except BaseException:
            os.killpg(launcher.pid, signal.SIGTERM)
            raise


class _Stop:
    """Forwards a stop request to the ranks, which write a checkpoint and exit with code 0.

    SIGTERM, SLURM's SIGUSR1 and a first Ctrl-C are stop requests; a second Ctrl-C ends all at once.
    The signal is repeated, because ranks do not handle it before they have joined.
    """

    def __init__(self, group: int) -> None:
        self._group = group
        self._is_requested = False
        self.is_interrupted = False
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._request)

    def repeat(self) -> None:
        """Send the signal to the ranks again, if a stop was requested."""
        if self._is_requested:
            os.killpg(self._group, signal.SIGUSR1)

    def wait_for_group(self) -> None:
        """Wait for the ranks after a stop request: a launcher that was signalled too ends first."""
        deadline = time.monotonic() + _GROUP_WAIT_S
        with contextlib.suppress(ProcessLookupError):
            while self._is_requested and time.monotonic() < deadline:
                os.killpg(self._group, 0)
                time.sleep(_GROUP_POLL_S)

    def _request(self, number: int, _frame: object) -> None:
        if self._is_requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._is_requested = True
        self.is_interrupted |= number == signal.SIGINT


def _before_launcher() -> None:
    die_with_parent()
    # The launcher does not handle this signal, which would kill it; the ranks do.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
