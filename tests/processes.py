"""The `d2i` command in a process of its own, as its user runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

COMMAND = (sys.executable, "-c", "from d2i.cli import main; main()")


def run_process(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run `d2i ARGUMENTS` to its end."""
    return subprocess.run(
        [*COMMAND, *(str(argument) for argument in arguments)],
        capture_output=True,
        text=True,
        check=False,
    )


def run_d2i(*arguments: object) -> Any:
    """Run `d2i ARGUMENTS`, which must succeed; return its JSON line where it was asked for one."""
    done = run_process(*arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]) if "--json" in arguments else None
