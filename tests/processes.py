"""Run the `d2i` command in its own process, as a user does."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

COMMAND = (sys.executable, "-c", "from d2i.cli import main; main()")


def run_process(
    *arguments: object, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `d2i ARGUMENTS` to its end, with these environment variables beside the present ones."""
    return subprocess.run(
        [*COMMAND, *(str(argument) for argument in arguments)],
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        check=False,
    )


def run_measured(*arguments: object) -> tuple[subprocess.CompletedProcess[str], int]:
    """Run `d2i ARGUMENTS` to its end; return also its peak resident memory in bytes.

    The largest of the children that it waited for counts, too.
    """
    command = [*COMMAND, *(str(argument) for argument in arguments)]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=out, stderr=errors)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        errors.seek(0)
        done = subprocess.CompletedProcess(command, process.returncode, out.read(), errors.read())
    return done, usage.ru_maxrss * 1024


def run_d2i(*arguments: object) -> Any:
    """Run `d2i ARGUMENTS`, which must succeed; return its JSON line if `--json` was given."""
    done = run_process(*arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]) if "--json" in arguments else None


def free_port() -> int:
    """Return a port on which nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def command_lines() -> Iterator[tuple[int, str]]:
    """Yield the pid and the command line of every process."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            yield int(path.parent.name), path.read_bytes().decode(errors="replace")
