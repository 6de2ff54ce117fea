"""The command line imports quickly and reports a mistake in one line with exit code 2."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from d2i import __version__
from d2i.errors import ConfigError
from d2i.recipes import resolve_recipe
from tests.processes import run_process
from tests.samples import metadata

HEAVY = ("torch", "ray", "deepspeed", "diffusers", "transformers", "numpy", "pyarrow")


def test_cli_app_imports_no_heavy_module() -> None:
    code = f"import d2i.cli.app, sys; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (("train", "--recipe", "demoo", "--data", "x", "--run", "y"), "did you mean 'demo'"),
        (
            ("train", "--recipe", "demo", "--data", "x", "--run", "y", "--set", "train.lrr=1"),
            "TrainConfig has no field 'lrr'",
        ),
        (("train", "--recipe", "demo", "--data", "/nowhere", "--run", "y"), "manifest.json"),
        (
            ("train", "--recipe", "uvit-s-photochat", "--data", "x", "--run", "y"),
            "mscoco_uvit_small.pth (github.com/baofff/U-ViT",
        ),
        (("recipes", "show", "demo", "--set", "text.strategy=hsh"), "text.strategy"),
        (("recipes", "show", "demo", "--set", "train.optim.lr=Infinity"), "finite"),
        (("recipes", "show", ":x"), "module:function"),
        (("recipes", "show", "json:loads"), "module:function"),
        (("corpus", "--corpus", "jsonl", "--source", "/dev"), "holds no split of jsonl"),
        (("verify", "nowhere://x"), "expected a path, or a URL"),
        (("demo", "--out", "/dev/null/demo"), "/dev/null"),
        (("demo", "--seed", "-1"), "--seed"),
        (
            (
                *("eval", "--system", "uvit-s", "--data", "x", "--out", "y"),
                *("--workers", "2"),
            ),
            "--parallel",
        ),
        (
            ("train", "--recipe", "demo", "--data", "x", "--run", "y", "--num-accelerators", "7"),
            "cannot split evenly",
        ),
        (
            (
                *("preprocess", "--corpus", "mmdialog", "--source", "/nowhere"),
                *("--out", "o", "--recipe", "demo"),
            ),
            "no such file or directory",
        ),
        (("verify", "/nowhere"), "has no manifest.json"),
        (("cluster", "check", "--ray-address", "127.0.0.1:9"), "no connection to 127.0.0.1:9"),
        (("cluster", "check", "--ray-address", "auto", "--set", "image.resolution=8"), "--recipe"),
        (("eval", "--system", "run:x", "--data", "/nowhere", "--out", "o"), "recipe.json"),
        (("report", "/nowhere"), "/nowhere"),
        (("recipes", "show", "nothing"), "no such recipe"),
        (("eval", "--foo"), "No such option"),
        (("nothing",), "No such command"),
        (
            ("train", "--recipe", "demo", "--data", "x", "--run", "y", "--fault", "a:b:c"),
            "expected POINT",
        ),
    ],
)
def test_user_mistake_is_one_line_error_with_exit_code_2(
    arguments: tuple[str, ...], hint: str
) -> None:
    done = run_process(*arguments)
    assert done.returncode == 2
    assert hint in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert done.stdout == ""


def write_one_sample(directory: Path, values: dict[str, object]) -> None:
    import numpy as np

    from d2i.shards import Sample, json_bytes, npy_bytes, write_manifest, write_shard

    members = {"json": json_bytes(values), "tokens.npy": npy_bytes(np.zeros(77, np.uint16))}
    write_shard([Sample("a", members)], str(directory), 0, failures={})
    write_manifest(str(directory), {})


def test_inspect_rejects_sample_with_missing_field(tmp_path: Path) -> None:
    write_one_sample(tmp_path, {"key": "a"})
    done = run_process("inspect", tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "sample a: the json member is not valid" in done.stderr
    assert "Traceback" not in done.stderr


def test_verify_exits_1_for_truncated_tar(tmp_path: Path) -> None:
    write_one_sample(tmp_path, metadata("a"))
    assert run_process("verify", tmp_path).returncode == 0
    tar = next(tmp_path.glob("*.tar"))
    tar.write_bytes(tar.read_bytes()[:-512])
    done = run_process("verify", tmp_path)
    assert done.returncode == 1
    assert tar.name in done.stdout


@pytest.mark.parametrize(
    ("setting", "hint"),
    [
        ("train.num_steps=" + "[" * 100_000, "train.num_steps is '[[["),
        ("a." * 100_000 + "b=1", "Recipe has no field 'a'"),
        ("a" * 100_000, "expected NAME=VALUE"),
    ],
    ids=["nested", "dotted", "long"],
)
def test_overlong_setting_is_short_error(setting: str, hint: str) -> None:
    # In this process, as the system limits the length of a command line.
    with pytest.raises(ConfigError) as caught:
        resolve_recipe("demo", [setting])
    assert hint in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_python_without_docstrings_is_one_line_error() -> None:
    done = subprocess.run(
        [sys.executable, "-OO", "-c", "from d2i.cli import main; main()", "recipes"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "unset PYTHONOPTIMIZE" in line


@pytest.mark.parametrize("debug", [(), ("--debug",)])
def test_future_warnings_are_hidden_without_debug(debug: tuple[str, ...]) -> None:
    """Also in the processes that a command starts."""
    warn = "import warnings; warnings.warn('some day', FutureWarning)"
    program = (
        "import sys, subprocess, d2i.cli.app as a\n"
        f"def work():\n    exec({warn!r})\n"
        f"    subprocess.run([sys.executable, '-c', {warn!r}])\n"
        "a.app.command('work')(work)\n"
        f"sys.argv = ['d2i', *{debug!r}, 'work']\n"
        "a.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={name: value for name, value in os.environ.items() if name != "PYTHONWARNINGS"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("FutureWarning: some day") == (2 if debug else 0)


def test_version_option_prints_version() -> None:
    done = run_process("--version")
    assert (done.returncode, done.stdout) == (0, f"{__version__}\n"), done.stderr
