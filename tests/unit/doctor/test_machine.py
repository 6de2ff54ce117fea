"""The checks of `d2i doctor` are lazy and isolated, and detect a broken environment."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from d2i.doctor import machine as doctor
from d2i.doctor.check import INSTALL_ALL, REINSTALL, Check, run_checks


def test_crashed_check_is_fail_row_and_next_check_runs() -> None:
    def crash() -> Check:
        raise ValueError("first line\nsecond line")

    rows = list(run_checks([("broken", crash), ("Python", doctor.check_python), ("again", crash)]))

    assert [row.status for row in rows] == ["fail", "ok", "fail"]
    assert rows[0].name == "broken"
    assert rows[0].detail == "ValueError: first line"
    assert rows[0].fix


@pytest.mark.parametrize(
    ("module", "fix"), [("torch.nn", INSTALL_ALL), ("d2i.nothing", REINSTALL), ("lzma", REINSTALL)]
)
def test_missing_module_is_answered_with_what_brings_it(module: str, fix: str) -> None:
    def need() -> Check:
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    (row,) = run_checks([("needy", need)])
    assert (row.status, row.fix) == ("fail", fix)
    assert module in row.detail


def test_run_checks_is_lazy() -> None:
    asked: list[str] = []

    def note() -> Check:
        asked.append("asked")
        return Check("note", "ok", "")

    rows = run_checks([("a", note), ("b", note)])
    assert asked == []
    next(rows)
    assert asked == ["asked"]


def test_quick_checks_pass_in_this_environment() -> None:
    assert doctor.check_python().status == "ok"
    assert doctor.check_torch().status == "ok"
    assert doctor.check_vocabulary().status == "ok"
    assert doctor.check_gpu().status in {"ok", "warn"}


def test_check_rows_are_one_line_and_failures_have_a_fix(tmp_path: Path) -> None:
    rows = [
        doctor.check_python(),
        doctor.check_gpu(),
        doctor.check_disk(tmp_path),
        doctor.check_shared_memory(),
        doctor.check_deepspeed(str(tmp_path)),
        doctor.check_inception(tmp_path),
    ]
    for row in rows:
        assert row.detail
        assert "\n" not in row.detail + row.fix
        assert row.status == "ok" or row.fix


def test_missing_compiler_row_names_package_to_install(tmp_path: Path) -> None:
    row = doctor.check_deepspeed(str(tmp_path))
    assert row.status == "warn"
    assert "C++ compiler" in row.detail
    assert "apt-get install g++" in row.fix


def test_broken_compiler_is_warning_with_fix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    for program in ("c++", "ninja"):
        (tmp_path / program).write_text(
            "#!/bin/sh\necho 'fatal error: Python.h: not there' >&2\nexit 1\n"
        )
        (tmp_path / program).chmod(0o755)

    row = doctor.check_deepspeed(str(tmp_path))

    assert row.status == "warn"
    assert "Python.h: not there" in row.detail
    assert "python3-dev" in row.fix


def test_hanging_ray_is_killed_with_its_children(tmp_path: Path) -> None:
    alive = tmp_path / "alive"
    os.mkfifo(alive)
    reader = os.open(alive, os.O_RDONLY | os.O_NONBLOCK)
    child = f"import threading; a = open({str(alive)!r}, 'w'); threading.Event().wait()"
    program = (
        "import subprocess, sys, threading\n"
        f"subprocess.Popen([sys.executable, '-c', {child!r}])\n"
        "threading.Event().wait()\n"
    )

    row = doctor.check_ray(timeout_s=5.0, program=program)

    assert row.status == "fail"
    assert "within 5 s" in row.detail
    os.set_blocking(reader, True)
    assert os.read(reader, 1) == b""  # EOF: no process holds the pipe open any more
    os.close(reader)


def test_failed_ray_start_shows_last_line() -> None:
    row = doctor.check_ray(program="import sys; sys.exit('no room for the object store')")
    assert row == Check("Ray", "fail", "did not start: no room for the object store", row.fix)


@pytest.mark.slow
def test_check_ray_starts_ray() -> None:
    row = doctor.check_ray()
    assert row.status == "ok", row.detail


def test_inception_weights_are_checked_by_sha256(tmp_path: Path) -> None:
    assert doctor.check_inception(tmp_path).status == "warn"

    cache = tmp_path / "checkpoints"
    cache.mkdir()
    content = b"half a download"
    (cache / "weights-inception-2015-12-05-6726825d.pth").write_bytes(content)

    row = doctor.check_inception(tmp_path)
    assert row.status == "fail"
    assert hashlib.sha256(content).hexdigest()[:8] in row.detail


def test_doctor_imports_no_heavy_module() -> None:
    heavy = {"torch", "ray", "deepspeed", "diffusers", "transformers"}
    program = "import sys, d2i.doctor.machine; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=os.environ
    ).stdout.split()
    assert not heavy & set(loaded)
