"""An emulated SLURM: `srun` and `scontrol` on PATH, which run everything on this machine.

`srun` starts its tasks with the variables that SLURM sets, forwards the signals that it receives,
and exits with the highest exit code. `scontrol requeue` only records the request.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_PROGRAM = f"""#!{sys.executable}
import sys
sys.path.insert(0, {str(ROOT)!r})
from tests.slurm import NAME
sys.exit(NAME())
"""


class Slurm:
    """A directory of emulated SLURM programs, and their requeue requests.

    Args:
        directory: The directory of the programs.
        num_nodes: The number of nodes that the job sees; all are this machine.
        num_tasks: Tasks of a step that does not specify a number.
    """

    def __init__(self, directory: Path, num_nodes: int, num_tasks: int) -> None:
        self._requeued = directory / "requeued"
        programs = directory / "bin"
        programs.mkdir(parents=True)
        for name in ("srun", "scontrol"):
            (programs / name).write_text(_PROGRAM.replace("NAME", name))
            (programs / name).chmod(0o755)
        host = os.uname().nodename
        self._environment = os.environ | {
            "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
            "D2I_VENV": str(Path(sys.executable).parents[1]),
            "EMULATED_REQUEUED": str(self._requeued),
            "SLURM_SUBMIT_DIR": str(ROOT),
            "SLURM_JOB_ID": str(os.getpid()),
            "SLURM_JOB_NUM_NODES": str(num_nodes),
            "SLURM_JOB_NODELIST": host,
            "SLURM_NTASKS": str(num_tasks),
            "SLURM_CPUS_PER_TASK": "1",
            "SLURMD_NODENAME": host,
        }

    @property
    def num_requeued(self) -> int:
        """Return how often a job requested a requeue."""
        return len(self._requeued.read_text().splitlines()) if self._requeued.exists() else 0

    def start(self, script: Path, *arguments: object, log: Path) -> subprocess.Popen[bytes]:
        """Start a batch script as SLURM would on the first node."""
        with log.open("w") as out:
            return subprocess.Popen(
                ["bash", script, *map(str, arguments)],
                env=self._environment,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )


def end_all(process: subprocess.Popen[bytes]) -> None:
    """Kill the remaining processes of a job, as SLURM does."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def srun() -> int:
    """Run the tasks of one step to their end."""
    words = sys.argv[1:]
    num_options = next(i for i, word in enumerate(words) if not word.startswith("--"))
    options = dict(word.split("=", 1) for word in words[:num_options])
    num_tasks = int(options.get("--ntasks", os.environ["SLURM_NTASKS"]))
    tasks = [_start(words[num_options:], number, num_tasks) for number in range(num_tasks)]

    def pass_on(number: int, _frame: object) -> None:
        for task in tasks:
            task.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, pass_on)
    return max(abs(task.wait()) for task in tasks)


def _start(command: list[str], number: int, num_tasks: int) -> subprocess.Popen[bytes]:
    of_task = {
        "SLURM_PROCID": str(number),
        "SLURM_LOCALID": str(number),
        "SLURM_NTASKS": str(num_tasks),
        "SLURM_STEP_NODELIST": os.environ["SLURM_JOB_NODELIST"],
    }
    return subprocess.Popen(command, env=os.environ | of_task)


def scontrol() -> int:
    """Record that the job requested a requeue."""
    assert sys.argv[1:] == ["requeue", os.environ["SLURM_JOB_ID"]]
    with Path(os.environ["EMULATED_REQUEUED"]).open("a") as file:
        file.write("requeued\n")
    return 0
