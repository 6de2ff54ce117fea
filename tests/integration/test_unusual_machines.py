"""Unusual file systems, directories and environment variables are supported, or one line error."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from d2i.shards import verify
from tests.integration.test_image_root import write_corpus, write_images
from tests.integration.training import command
from tests.processes import COMMAND

# Imported by every Python that finds it on its path: chmod fails as on FUSE and CIFS mounts.
NO_CHMOD = """import errno, os
def refused(*_args, **_kwargs):
    raise OSError(errno.EOPNOTSUPP, "Operation not supported")
os.chmod = os.fchmod = refused
"""


def run_under(
    names: dict[str, str], *arguments: object, without: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    """Run `d2i ARGUMENTS` with the given environment variables, and without those of `without`."""
    env = {key: value for key, value in os.environ.items() if key not in without} | names
    line = [*COMMAND, *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, check=False, env=env)


def preprocess_line(directory: Path, out: object, *extra: object) -> list[object]:
    source, root = directory / "corpus", directory / "images"
    if not source.exists():
        write_corpus(source, "test")
        write_images(root, "test")
    place = ("--set", f"corpus.image_root={root}")
    line = ("preprocess", "--corpus", "mmdialog", "--source", source, "--out", out)
    return [*line, "--recipe", "demo", *place, *extra]


def test_preprocess_works_on_file_system_without_chmod(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(NO_CHMOD)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    line = preprocess_line(tmp_path, tmp_path / "out", "--workers", 0)
    done = run_under({"PYTHONPATH": path}, *line)
    assert done.returncode == 0, done.stderr[-2000:]
    assert verify(str(tmp_path / "out" / "test")).ok


@pytest.mark.soak
def test_ray_starts_with_long_tmpdir(tmp_path: Path) -> None:
    directory = tmp_path / ("scratch" * 12)
    directory.mkdir()
    line = preprocess_line(tmp_path, tmp_path / "out", "--workers", 1)
    done = run_under({"TMPDIR": str(directory)}, *line, without=["RAY_TMPDIR"])
    assert done.returncode == 0, done.stderr[-2000:]
    assert verify(str(tmp_path / "out" / "test")).ok


def test_ray_start_failure_is_one_line_error_with_advice(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    line = preprocess_line(tmp_path, tmp_path / "out", "--workers", 1)
    done = run_under({"RAY_TMPDIR": str(tmp_path / "file")}, *line)
    assert done.returncode == 2
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert error.startswith("error: Ray did not start on this machine: ")
    assert "set RAY_TMPDIR to a short path on a local disk" in error
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("out", ["a::b", pytest.param("data:2024", marks=pytest.mark.soak)])
def test_output_directory_may_look_like_url(tmp_path: Path, out: str) -> None:
    line = preprocess_line(tmp_path, tmp_path / out, "--workers", 0)
    assert run_under({}, *line).returncode == 0
    assert verify(str(tmp_path / out / "test")).ok
    assert {path.name for path in tmp_path.iterdir()} == {"corpus", "images", out}


def test_macos_appledouble_files_are_not_read_as_corpus(tmp_path: Path) -> None:
    line = preprocess_line(tmp_path, tmp_path / "out", "--workers", 0)
    split = tmp_path / "corpus" / "test"
    (split / "._conversations.json").write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X        " + bytes(220))
    done = run_under({}, *line, "--dry-run", "--json")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout


@pytest.mark.parametrize(
    "names",
    [
        {"WORLD_SIZE": "4", "RANK": "2", "MASTER_ADDR": "10.255.255.1", "MASTER_PORT": "1234"},
        {
            "SLURM_NTASKS": "4",
            "SLURM_PROCID": "0",
            "SLURM_LOCALID": "0",
            "SLURM_JOB_ID": "77",
            "SLURM_NODELIST": "node[01-04]",
        },
    ],
    ids=["torchrun", "slurm"],
)
def test_train_ignores_leftover_torchrun_and_slurm_variables(
    names: dict[str, str], training_data: Path, tmp_path: Path
) -> None:
    line = command(training_data, tmp_path / "run", 1, train__num_steps=1)
    done = run_under(names, *line)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((tmp_path / "run" / "config.json").read_text())["world_size"] == 1
