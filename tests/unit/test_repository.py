"""Repository checks: the files that a fresh clone, a release and a reader rely on."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
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
DIRECTORIES = ("preprocess", "train", "eval", "cluster", "benchmarks", "examples")

# May lack an import: DeepSpeed's builder calls ninja, open_clip brings CLIP's vocabulary, and
# torch writes its events through tensorboard.
NOT_IMPORTED = {"ninja", "open-clip-torch", "tensorboard"}


def programs() -> list[Path]:
    files = (path for directory in DIRECTORIES for path in (ROOT / directory).rglob("*.py"))
    return sorted(path for path in files if 'if __name__ == "__main__":' in path.read_text())


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
def test_programs_outside_package_have_help(program: Path) -> None:
    name = relative(program)
    # Programs of several files are run as modules.
    is_module = name.count("/") > 1
    how = ["-m", name.removesuffix(".py").replace("/", ".")] if is_module else [name]
    done = run(sys.executable, *how, "--help")
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout.lower()


@pytest.mark.parametrize("directory", DIRECTORIES)
def test_directories_outside_package_have_readme_but_no_init(directory: str) -> None:
    assert (ROOT / directory / "README.md").is_file()
    assert not list((ROOT / directory).rglob("__init__.py"))


def test_config_and_script_files_parse() -> None:
    files = [path for directory in DIRECTORIES for path in (ROOT / directory).rglob("*")]
    for path in [*files, *(ROOT / ".github").rglob("*"), ROOT / ".pre-commit-config.yaml"]:
        if path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix in {".yaml", ".yml"}:
            list(yaml.safe_load_all(path.read_text()))
        elif path.suffix in {".sh", ".sbatch"}:
            assert run("bash", "-n", relative(path)).returncode == 0, relative(path)


def test_changelog_starts_with_current_version() -> None:
    heads = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert heads[0] == d2i.__version__


def test_cli_imports_no_heavy_module() -> None:
    program = "import sys, d2i.cli; print(*sys.modules)"
    done = run(sys.executable, "-c", program)
    assert done.returncode == 0, done.stderr
    heavy = {"torch", "ray", "deepspeed", "diffusers", "transformers", "torchvision"}
    assert not heavy & set(done.stdout.split())


def test_every_code_directory_is_a_package() -> None:
    directories = {path.parent for path in (ROOT / "d2i").rglob("*.py")}
    assert [
        relative(directory)
        for directory in directories
        if not (directory / "__init__.py").is_file()
    ] == []


def test_wheel_contains_every_package_file() -> None:
    content = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = content["tool"]["setuptools"]["package-data"]["d2i"]
    package = ROOT / "d2i"
    shipped = {path for pattern in patterns for path in package.glob(pattern)}
    # Up to Python 3.12, a final `**` of glob matches only directories; in setuptools also files.
    shipped |= {path for directory in shipped if directory.is_dir() for path in directory.iterdir()}
    files = {path for path in package.rglob("*") if path.is_file()}
    code = {path for path in files if path.suffix in {".py", ".pyc"}}
    assert sorted(map(relative, files - code - shipped)) == []


def test_constraints_pin_one_version_per_line() -> None:
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line), line


@pytest.mark.parametrize("extra", [None, "all", "cluster", "dev", "lora", "s3"])
def test_dependencies_are_pinned_within_bounds(extra: str | None) -> None:
    for requirement in declared(extra):
        pin = pins().get(canonicalize_name(requirement.name))
        assert pin is not None, f"{requirement.name} is not in constraints.txt"
        assert requirement.specifier.contains(pin), f"{requirement}, but {pin} is pinned"


def imported_distributions() -> dict[str, str]:
    """Return each installed distribution that d2i imports, with one importing file."""
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


def test_imports_match_declared_dependencies() -> None:
    imported = imported_distributions()
    wanted = {canonicalize_name(r.name) for r in [*declared(), *declared("all")]}
    extras = [*declared("cluster"), *declared("lora")]
    known = wanted | {canonicalize_name(requirement.name) for requirement in extras} | {"d2i"}
    undeclared = {name: path for name, path in imported.items() if name not in known}
    assert undeclared == {}
    assert wanted - set(imported) <= NOT_IMPORTED


def test_make_rejects_unsupported_python(tmp_path: Path) -> None:
    done = run("make", "setup", f"VENV={tmp_path / 'venv'}", "PYTHON=/nonexistent/python3.9")
    assert done.returncode == 2
    assert "is not Python 3.11 or 3.12" in done.stderr
    assert not (tmp_path / "venv").exists()


def test_make_reports_missing_python(tmp_path: Path) -> None:
    programs_dir = tmp_path / "bin"
    programs_dir.mkdir()
    for name in ("sh", "rm", "touch", "echo", "sed"):
        found = next(
            Path(directory) / name
            for directory in ("/bin", "/usr/bin")
            if Path(directory, name).exists()
        )
        (programs_dir / name).symlink_to(found)
    make = run("sh", "-c", "command -v make").stdout.strip()
    done = run(make, "setup", f"VENV={tmp_path / 'venv'}", PATH=str(programs_dir))
    assert done.returncode == 2
    assert "no Python 3.11 or 3.12 on PATH" in done.stderr


def test_ci_run_is_executable_and_matches_workflow() -> None:
    ci_run = ROOT / ".ci" / "run"
    assert os.access(ci_run, os.X_OK)
    assert run("bash", "-n", relative(ci_run)).returncode == 0
    commands = [line for line in ci_run.read_text().splitlines() if line.startswith("make ")]
    assert commands == ["make check", "make docs", "make package", "make test"]
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    assert all(f"run: {command}\n" in workflow for command in commands)


def test_release_is_the_version_of_tag_and_changelog(tmp_path: Path) -> None:
    """The steps of the workflow, run on this version: as it is, dated, and under another tag."""
    workflow = yaml.safe_load((ROOT / ".github/workflows/release.yml").read_text())
    ci, package, publish = workflow["jobs"].values()
    assert (ci["uses"], package["needs"]) == ("./.github/workflows/ci.yml", "ci")
    assert publish["needs"] == "package"
    _, compares, dates = (step["run"] for step in package["steps"] if "name" in step)
    (tmp_path / "d2i").mkdir()
    shutil.copy(ROOT / "d2i" / "__init__.py", tmp_path / "d2i")
    changelog = f"## [{d2i.__version__}] - 2026-01-31\n"
    (tmp_path / "CHANGELOG.md").write_text(changelog)

    def passes(step: str, tag: str) -> bool:
        done = subprocess.run(
            ["bash", "-ec", step],
            cwd=tmp_path,
            env=os.environ | {"GITHUB_REF_NAME": tag},
            check=False,
        )
        return done.returncode == 0

    tag = f"v{d2i.__version__}"
    assert passes(compares, tag)
    assert not passes(compares, "v9.9.9")
    assert passes(dates, tag)
    (tmp_path / "CHANGELOG.md").write_text(changelog.replace("2026-01-31", "Unreleased"))
    assert not passes(dates, tag)
    assert f"version: {d2i.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"## [{d2i.__version__}] - " in (ROOT / "CHANGELOG.md").read_text()


def test_where_is_table_names_existing_code_and_tests() -> None:
    page = (ROOT / "ARCHITECTURE.md").read_text()
    table = page.partition("## Where is")[2].partition("\n## ")[0]
    rows = [line.split("|")[2:4] for line in table.splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 20
    for code, test in rows:
        source = ""
        for quoted in re.findall(r"`([^`]+)`", code):
            path, _, name = quoted.rpartition(":")
            source = (ROOT / path).read_text() if path else source
            if (ROOT / quoted).exists():
                continue
            last = re.escape(name.rpartition(".")[2])
            assert re.search(rf"(?m)^\s*(def|class) {last}\b|^{last}\b.* = ", source), quoted
        for quoted in re.findall(r"`([^`]+)`", test):
            assert (ROOT / quoted).exists(), quoted
