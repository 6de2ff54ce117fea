"""The progress bar: whole lines above it, nothing left of it by a kill, lines elsewhere."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest

from d2i.io.progress_bar import Counts
from tests.terminal import Shown, run_on_terminal

PROGRAM = """
import logging, sys, time, warnings
from contextlib import closing
from d2i.io.progress_bar import Counts, ProgressBar
from d2i.io.terminal import print_plainly

print_plainly()
def counts(done, total=1000):
    failures = {"decode_error": done // 100, "missing_file": 1}
    return Counts(f"{done}/{total}", done, total, "images", time.monotonic() - 10, 0, failures)
"""
WORK = """
with closing(ProgressBar()) as bar:
    bar.wait("Starting Ray with 2 workers …")
    bar.show(counts(200))
    sys.stderr.write("one line\\n")
    bar.show(counts(300))
    logging.getLogger("fetch").warning("another \\x1b[2J line")
    bar.show(counts(500))
    print("result")
"""
WAIT = """
with closing(ProgressBar()) as bar:
    bar.show(counts(500))
    sys.stderr.write("working\\n")
    time.sleep(60)
"""


def run(work: str, **how: object) -> Shown:
    program = [sys.executable, "-c", PROGRAM + work]
    return run_on_terminal(program=program, **how)  # type: ignore[arg-type]


@pytest.mark.parametrize("columns", [50, 80])
def test_bar_has_rate_time_left_and_failures_below_whole_log_lines(columns: int) -> None:
    shown = run(WORK, columns=columns, pipe_stdout=True)
    assert (shown.returncode, shown.stdout) == (0, "result\n")
    *lines, bar, details, end = shown.screen()
    assert lines == ["one line", "another \\x1b[2J line"]
    assert re.fullmatch(r"[━╸╺]+ 500/1000 images  50/s  0:00:10 left", bar)
    assert len(bar) == columns
    assert details == "failed: 6 (5 decode_error, 1 missing_file)"
    assert end == ""
    assert "Starting Ray with 2 workers" in shown.terminal


def test_narrow_terminal_has_numbers_without_bar() -> None:
    shown = run(WORK, columns=36, pipe_stdout=True)
    assert "500/1000 images  50/s  0:00:10 left" in shown.screen()


def test_no_color_leaves_bar_without_colors() -> None:
    colored, plain = run(WORK), run(WORK, env={"NO_COLOR": "1"})
    color = re.compile(r"\x1b\[[0-9;]*m")
    assert color.search(colored.terminal)
    assert not color.search(plain.terminal)
    assert any(line.endswith("500/1000 images  50/s  0:00:10 left") for line in plain.screen())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_interrupted_command_leaves_cursor_visible(number: signal.Signals) -> None:
    shown = run(WAIT, interrupt_after="working", number=number)
    assert shown.returncode in (-number, 1)
    assert "working" in shown.screen()
    # Nothing hides it, so that nothing has to show it again.
    assert "\x1b[?25" not in shown.terminal


def test_waiting_leaves_no_line_if_nothing_was_counted() -> None:
    shown = run('with closing(ProgressBar()) as bar:\n    bar.wait("Starting Ray …")\n')
    assert "Starting Ray …" in shown.terminal
    assert [line for line in shown.screen() if line] == []


def test_lines_without_terminal_are_plain() -> None:
    work = WORK.replace("bar.show(counts(500))", "bar.show(counts(500)); bar.show(counts(501))")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM + work], capture_output=True, text=True, check=True
    )
    # One line at first, then one in five seconds, and the last one.
    expected = ["Starting Ray with 2 workers …", "200/1000", "one line", "another \\x1b[2J line"]
    assert done.stderr.splitlines() == [*expected, "501/1000"]
    assert done.stdout == "result\n"


def test_short_work_is_one_line_without_terminal() -> None:
    work = """
with closing(ProgressBar()) as bar:
    bar.show(counts(1, 1))
    bar.show(counts(1, 1))
"""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM + work], capture_output=True, text=True, check=True
    )
    assert done.stderr == "1/1\n"


def test_rich_is_imported_on_terminal_only() -> None:
    code = PROGRAM + WORK + 'print("rich" in sys.modules)'
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "result\nFalse\n"


def test_rate_leaves_out_what_earlier_commands_did(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(monotonic=lambda: 110.0)
    monkeypatch.setattr("d2i.io.progress_bar.time", clock)
    counts = Counts("", 60, 100, "images", started=100.0, num_before=40)
    assert (counts.items_per_s(), counts.left_s()) == (2.0, 20.0)
    assert Counts("", 60, None, "images", started=100.0).left_s() is None
    assert Counts("", 0, 100, "images", started=100.0).left_s() is None
