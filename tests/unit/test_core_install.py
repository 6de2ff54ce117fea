"""`pip install d2i` alone reads, indexes and verifies shards; other commands name the extra."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from functools import cache
from importlib.metadata import distribution, packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from d2i.errors import EXTRA_MODULES, missing_extra
from tests.unit.shards.test_index_tars import write_tar
from tests.unit.test_repository import ROOT, declared, imported_modules

BEFORE = ROOT / "tests" / "made_before"
ONE_LINE = 'run pip install "d2i[all]"'

# Runs `d2i` in a process in which no module but those of d2i and its own dependencies is found.
PROGRAM = """
import importlib.abc, json, sys
absent = set(json.loads(sys.argv[1]))
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in absent:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
code = sys.argv[2]
sys.argv[1:] = sys.argv[3:]
exec(code)
"""
COMMAND = "from d2i.cli import main; main()"


@cache
def core_distributions() -> frozenset[str]:
    """Return what `pip install d2i` brings: its dependencies, and theirs."""
    found: set[str] = set()
    waiting = [requirement.name for requirement in declared()]
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name in found:
            continue
        found.add(name)
        for line in distribution(name).requires or ():
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(requirement.name)
    return frozenset(found)


@cache
def absent_modules() -> list[str]:
    """Return the modules of this environment that `pip install d2i` alone does not bring."""
    core = core_distributions() | {"d2i"}
    return sorted(
        module
        for module, owners in packages_distributions().items()
        if not core & {canonicalize_name(owner) for owner in owners}
        and module not in sys.stdlib_module_names  # backports of old
    )


def run_in_core(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-c", PROGRAM, json.dumps(absent_modules()), code]
    return subprocess.run(
        [*words, *map(str, arguments)], capture_output=True, text=True, check=False, cwd=ROOT
    )


def test_core_is_light() -> None:
    absent = set(absent_modules())
    assert {"torch", "ray", "deepspeed", "transformers", "diffusers", "torchvision"} <= absent
    assert len(core_distributions()) <= 20


def test_extra_modules_are_those_that_d2i_imports_from_the_extra() -> None:
    owners = packages_distributions()
    extra = {canonicalize_name(requirement.name) for requirement in declared("all")}
    imported = {name for path in (ROOT / "d2i").rglob("*.py") for name in imported_modules(path)}
    of_extra = {
        module
        for module, of_module in owners.items()
        if extra & {canonicalize_name(owner) for owner in of_module}
    }
    assert imported & of_extra <= EXTRA_MODULES <= of_extra
    assert not EXTRA_MODULES & set(sys.stdlib_module_names)


def test_all_is_what_every_install_of_a_checkout_names() -> None:
    makefile, docker = (ROOT / "Makefile").read_text(), (ROOT / "cluster/Dockerfile").read_text()
    assert "--constraint constraints.txt --editable '.[all,dev]'" in makefile
    assert docker.count("--constraint constraints.txt '.[all,cluster]'") == 2
    assert not {r.name for r in declared("all")} & {r.name for r in declared()}


def test_core_reads_indexes_and_verifies_shards(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("0.txt", b"text")])
    for words, expected in (
        (["--help"], "Start here"),
        (["index", tmp_path], "1 samples in 1 tars"),
        (["verify", tmp_path], "0 problems"),
        (["verify", BEFORE / "data"], "0 problems"),
        (["inspect", BEFORE / "data" / "test"], "look at"),
        (["recipes", "show", "demo"], "resolution"),
    ):
        done = run_in_core(COMMAND, *words)
        assert (done.returncode, expected in done.stdout) == (0, True), done.stderr
    program = (
        "from d2i.shards import ShardReader\n"
        f"reader = ShardReader({str(BEFORE / 'data' / 'train')!r})\n"
        "print(len(reader), *sorted(reader.read([1, 0])), reader.keys[0])"
    )
    done = run_in_core(program)
    assert done.stdout.split() == ["2", "clip", "moments", "text", "tokens", "train-train0-1-0"]


def test_core_reads_conversations_and_writes_a_report(tmp_path: Path) -> None:
    program = (
        "from d2i.corpora import read_instances\n"
        f"print(len(list(read_instances('jsonl', {str(BEFORE / 'chats')!r}, 'train'))))"
    )
    done = run_in_core(program)
    assert done.stdout.split() == ["2"], done.stderr
    page = tmp_path / "report.html"
    done = run_in_core(COMMAND, "report", BEFORE / "evaluation", "--out", page)
    assert done.returncode == 0, done.stderr
    assert page.stat().st_size > 10_000


@pytest.mark.parametrize(
    "words",
    [
        "preprocess --corpus jsonl --source {chats} --out {out} --recipe demo",
        "eval --system uvit-s --data {data} --out {out}",
        "sample --run {out} --dialog -",
        "corpus --corpus jsonl --source {chats}",
        "inspect {data}/test --html {out}",
        "push {out} owner/name",
        "weights inspect {data}",
        "cluster check --ray-address auto",
    ],
)
def test_command_that_needs_the_extra_says_so_in_one_line(words: str, tmp_path: Path) -> None:
    places = {"data": BEFORE / "data", "chats": BEFORE / "chats", "out": tmp_path / "out"}
    done = run_in_core(COMMAND, *words.format(**places).split())
    assert done.returncode == 2, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: this needs ")
    assert ONE_LINE in last
    assert "Traceback" not in done.stderr


def test_training_without_the_extra_says_so_in_one_line(tmp_path: Path) -> None:
    # Beside this Python there is no launcher, as there is none where the extra is not installed.
    code = f"sys.executable = {str(tmp_path / 'python')!r}\n{COMMAND}"
    words = ["--recipe", "demo", "--data", BEFORE / "data", "--run", tmp_path / "run"]
    done = run_in_core(code, "train", *words, "--set", "backbone.weights=scratch")
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: no deepspeed launcher")
    assert ONE_LINE in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("what", ["load", "webdataset(DATA)"])
def test_python_names_the_extra_too(what: str) -> None:
    code = f"import d2i\nDATA = {str(BEFORE / 'data' / 'train')!r}\nlen(d2i.Dataset(DATA))\n"
    done = run_in_core(f"{code}d2i.{what}")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("ModuleNotFoundError: this needs ")
    assert ONE_LINE in done.stderr.splitlines()[-1]


def test_debug_shows_where_the_module_is_missing() -> None:
    done = run_in_core(COMMAND, "--debug", "cluster", "check", "--ray-address", "auto")
    assert "ModuleNotFoundError" in done.stderr


def test_a_missing_module_of_no_extra_is_not_explained_away() -> None:
    assert missing_extra(ModuleNotFoundError("no", name="torch.nn")) is not None
    assert missing_extra(ModuleNotFoundError("no", name="torchy")) is None
    assert missing_extra(ModuleNotFoundError("no")) is None


@pytest.mark.soak
def test_wheel_installs_alone_in_a_fresh_environment(tmp_path: Path) -> None:
    """Build the wheel, install it without extras, and read shards with it."""
    source, left_out = tmp_path / "source", (".git", ".venv*", "build", "*.egg-info", "tests")
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(*left_out))
    build = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "-o",
        str(tmp_path),
        str(source),
    ]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", wheel], check=True)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*words: object) -> subprocess.CompletedProcess[str]:
        command = [str(python.with_name("d2i")), *map(str, words)]
        return subprocess.run(
            command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment
        )

    listed = [str(python), "-m", "pip", "list", "--format=json"]
    names = {p["name"] for p in json.loads(subprocess.run(listed, stdout=-1, check=True).stdout)}
    assert not {"torch", "ray", "deepspeed", "transformers", "diffusers"} & names
    (tmp_path / "tars").mkdir()
    write_tar(tmp_path / "tars" / "a.tar", [("0.txt", b"text")])
    for words in (["--help"], ["verify", BEFORE / "data"], ["index", tmp_path / "tars"]):
        done = run(*words)
        assert done.returncode == 0, done.stderr
    refused = run(*["train", "--recipe", "demo", "--data", "x", "--run", "y"])
    assert (refused.returncode, refused.stderr.count("error: ")) == (2, 1)
