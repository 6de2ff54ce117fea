"""Run programs on a terminal, and read its screen."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import termios
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from tests.processes import COMMAND

_CONTROL = re.compile(r"\x1b\[([?0-9;]*)([A-Za-z])")


@dataclass(frozen=True)
class Shown:
    """Output of a program: on the terminal, and on its stdout if that was a pipe."""

    returncode: int
    terminal: str
    stdout: str

    def screen(self) -> list[str]:
        """Return the lines that stand on the terminal at the end."""
        return screen_lines(self.terminal)


def run_on_terminal(
    *arguments: object,
    program: Sequence[str] = COMMAND,
    columns: int = 80,
    env: Mapping[str, str] | None = None,
    pipe_stdout: bool = False,
    interrupt_after: str | None = None,
    number: signal.Signals = signal.SIGINT,
) -> Shown:
    """Run `d2i ARGUMENTS`, or another program, on a terminal of its own.

    Args:
        arguments: Its arguments.
        program: The program.
        columns: Width of the terminal.
        env: Environment variables beside the present ones.
        pipe_stdout: True to have only stdin and stderr on the terminal.
        interrupt_after: Send a signal once this text was written.
        number: The signal.
    """
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    environment = {k: v for k, v in os.environ.items() if k not in {"COLUMNS", "NO_COLOR"}}
    with subprocess.Popen(
        [*program, *map(str, arguments)],
        stdin=theirs,
        stdout=subprocess.PIPE if pipe_stdout else theirs,
        stderr=theirs,
        env={**environment, "TERM": "xterm-256color", **(env or {})},
        start_new_session=True,
        # A shell that runs the tests in the background ignores SIGINT, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        os.close(theirs)
        written = b""
        # A terminal that its last program has left gives an error.
        with suppress(OSError):
            while data := os.read(ours, 1 << 16):
                written += data
                if interrupt_after is not None and interrupt_after.encode() in written:
                    process.send_signal(number)
                    interrupt_after = None
        stdout = process.stdout.read() if process.stdout else b""
    os.close(ours)
    return Shown(process.returncode, written.decode(), stdout.decode())


def screen_lines(written: str) -> list[str]:
    """Return the lines that stand on a terminal, as it follows the few controls that d2i uses.

    Raises:
        ValueError: If another control was written.
    """
    lines, row, column, at = [""], 0, 0, 0
    while at < len(written):
        if control := _CONTROL.match(written, at):
            at = control.end()
            if control[0] == "\x1b[1A":
                row -= 1
            elif control[0] == "\x1b[2K":
                lines[row] = ""
            elif control[2] != "m":
                raise ValueError(f"unexpected control {control[0]!r}")
            continue
        character = written[at]
        at += 1
        if character == "\r":
            column = 0
        elif character == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        else:
            lines[row] = lines[row].ljust(column)[:column] + character + lines[row][column + 1 :]
            column += 1
    return [line.rstrip() for line in lines]
