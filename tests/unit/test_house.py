"""The house around the code: what a fresh clone, a release and a reader rely on."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import d2i

ROOT = Path(__file__).resolve().parents[2]
FACES = ("preprocess", "train", "eval", "cluster", "benchmarks")

# Never imported: DeepSpeed's builder calls ninja, open_clip brings CLIP's vocabulary, torch writes
# its events through tensorboard, and img2dataset is what the safe downloader is to be built on.
NOT_IMPORTED = {"img2dataset", "ninja", "open-clip-torch", "tensorboard", "webdataset"}


def programs() -> list[Path]:
    return sorted(path for face in FACES for path in (ROOT / face).rglob("*.py"))


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


@cache
def project() -> dict[str, Any]:
    content: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
    return content["project"]


@cache
def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return {
        canonicalize_name(name): pin for name, _, pin in (line.partition("==") for line in lines)
    }


def declared(extra: str | None = None) -> list[Requirement]:
    listed = project()["optional-dependencies"][extra] if extra else project()["dependencies"]
    return [Requirement(line) for line in listed]


def run(*command: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ, **env}
    )


@pytest.mark.parametrize("program", programs(), ids=relative)
def test_a_program_beside_the_package_explains_itself(program: Path) -> None:
    done = run(sys.executable, relative(program), "--help")
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout.lower()


@pytest.mark.parametrize("face", FACES)
def test_a_folder_beside_the_package_is_explained_and_not_importable(face: str) -> None:
    assert (ROOT / face / "README.md").is_file()
    assert not list((ROOT / face).rglob("__init__.py"))


def test_files_to_copy_can_be_parsed() -> None:
    files = [path for face in FACES for path in (ROOT / face).rglob("*")]
    for path in [*files, *(ROOT / ".github").rglob("*"), ROOT / ".pre-commit-config.yaml"]:
        if path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix in {".yaml", ".yml"}:
            list(yaml.safe_load_all(path.read_text()))
        elif path.suffix in {".sh", ".sbatch"}:
            assert run("bash", "-n", relative(path)).returncode == 0, relative(path)


def test_the_changelog_opens_with_this_version() -> None:
    heads = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert heads[0] == d2i.__version__


def test_importing_the_command_line_is_light() -> None:
    program = "import sys, d2i.cli; print(*sys.modules)"
    done = run(sys.executable, "-c", program)
    assert done.returncode == 0, done.stderr
    heavy = {"torch", "ray", "deepspeed", "diffusers", "transformers", "torchvision"}
    assert not heavy & set(done.stdout.split())


def test_every_folder_of_code_is_a_package() -> None:
    folders = {path.parent for path in (ROOT / "d2i").rglob("*.py")}
    assert [relative(folder) for folder in folders if not (folder / "__init__.py").is_file()] == []


def test_every_file_of_the_package_is_in_the_wheel() -> None:
    content = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = content["tool"]["setuptools"]["package-data"]["d2i"]
    package = ROOT / "d2i"
    shipped = {path for pattern in patterns for path in package.glob(pattern)}
    # Up to Python 3.12, glob takes `**` at the end for folders alone; setuptools takes files too.
    shipped |= {path for folder in shipped if folder.is_dir() for path in folder.iterdir()}
    files = {path for path in package.rglob("*") if path.is_file()}
    code = {path for path in files if path.suffix in {".py", ".pyc"}}
    assert sorted(map(relative, files - code - shipped)) == []


def test_a_constraint_is_one_name_and_one_version() -> None:
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line), line


@pytest.mark.parametrize("extra", [None, "cluster", "dev", "lora"])
def test_every_dependency_is_pinned_within_its_bounds(extra: str | None) -> None:
    for requirement in declared(extra):
        pin = pins().get(canonicalize_name(requirement.name))
        assert pin is not None, f"{requirement.name} is not in constraints.txt"
        assert requirement.specifier.contains(pin), f"{requirement}, but {pin} is pinned"


def imported_distributions() -> dict[str, str]:
    """Give each installed distribution that d2i imports, and one file that does."""
    owners = packages_distributions()
    found: dict[str, str] = {}
    for path in sorted((ROOT / "d2i").rglob("*.py")):
        for module in imported_modules(path) - sys.stdlib_module_names:
            for owner in owners.get(module, []):
                found.setdefault(canonicalize_name(owner), relative(path))
    return found


def imported_modules(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    return names


def test_what_is_imported_is_declared_and_what_is_declared_is_imported() -> None:
    imported = imported_distributions()
    wanted = {canonicalize_name(requirement.name) for requirement in declared()}
    undeclared = {name: path for name, path in imported.items() if name not in wanted | {"d2i"}}
    assert undeclared == {}
    assert wanted - set(imported) <= NOT_IMPORTED


def test_make_refuses_an_interpreter_it_cannot_use(tmp_path: Path) -> None:
    done = run("make", "setup", f"VENV={tmp_path / 'venv'}", "PYTHON=/nonexistent/python3.9")
    assert done.returncode == 2
    assert "is not Python 3.11 or 3.12" in done.stderr
    assert not (tmp_path / "venv").exists()


def test_make_says_so_when_there_is_no_python(tmp_path: Path) -> None:
    programs_dir = tmp_path / "bin"
    programs_dir.mkdir()
    for name in ("sh", "rm", "touch", "echo", "sed"):
        found = next(
            Path(folder) / name for folder in ("/bin", "/usr/bin") if Path(folder, name).exists()
        )
        (programs_dir / name).symlink_to(found)
    make = run("sh", "-c", "command -v make").stdout.strip()
    done = run(make, "setup", f"VENV={tmp_path / 'venv'}", PATH=str(programs_dir))
    assert done.returncode == 2
    assert "no Python 3.11 or 3.12 on PATH" in done.stderr


def test_the_gate_is_executable_and_runs_what_the_readme_names() -> None:
    gate = ROOT / ".ci" / "run"
    assert os.access(gate, os.X_OK)
    assert run("bash", "-n", relative(gate)).returncode == 0
    commands = [line for line in gate.read_text().splitlines() if line.startswith("make ")]
    assert commands == ["make check", "make test"]
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    assert all(f"run: {command}\n" in workflow for command in commands)
