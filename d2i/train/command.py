"""The `deepspeed` line that `d2i train` prints and runs."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import d2i
from d2i.errors import ClusterError
from d2i.processes import end_with_parent, starter_environment


def deepspeed_command(arguments: Sequence[str], num_accelerators: int | None) -> list[str]:
    """Return the command line: `deepspeed … train/launch.py ARGUMENTS`.

    Without a checkout (an installed wheel) the same entry is `--module d2i.train.launch`.

    Args:
        arguments: What `train/launch.py` takes.
        num_accelerators: Ranks on this machine; `None` takes every GPU, or one CPU rank.

    Raises:
        ClusterError: If the launcher is not installed beside this Python.
    """
    launcher = Path(sys.executable).with_name("deepspeed")
    if not launcher.exists():
        raise ClusterError(
            f"no deepspeed launcher beside {sys.executable}; expected it in the same "
            "environment; pip install deepspeed"
        )
    script = Path(d2i.__file__).parents[1] / "train" / "launch.py"
    entry = [str(script)] if script.exists() else ["--module", "d2i.train.launch"]
    ranks = [] if num_accelerators is None else ["--num_accelerators", str(num_accelerators)]
    return [str(launcher), "--master_port", str(_free_port()), *ranks, *entry, *arguments]


def run_command(command: Sequence[str]) -> int:
    """Run the launcher as a process group of its own, ended with this process; return its code.

    What the launcher prints goes to stderr: stdout is the command's own result.
    """
    environment = (
        os.environ
        | starter_environment()
        | {
            # The launcher finds ninja and python beside it, also without an activated environment.
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
            "TOKENIZERS_PARALLELISM": "false",
        }
    )
    with subprocess.Popen(
        list(command),
        env=environment,
        stdout=sys.stderr,
        start_new_session=True,
        preexec_fn=end_with_parent,
    ) as launcher:
        # Asked to end, this process takes the ranks along: the launcher would leave them behind.
        signal.signal(signal.SIGTERM, _leave)
        try:
            return launcher.wait()
        except BaseException:
            os.killpg(launcher.pid, signal.SIGTERM)
            raise


def _leave(signal_number: int, _frame: object) -> None:
    sys.exit(128 + signal_number)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
