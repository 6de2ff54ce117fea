"""Data sets, runs and evaluations of an earlier version open and are reproduced."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from d2i.shards import ShardReader
from tests.contracts import HERE, on_disk
from tests.integration.evaluations import images_by_name
from tests.made_before.make import commands, run_all
from tests.processes import run_d2i, run_process

BEFORE = Path(__file__).parents[1] / "made_before"


@pytest.fixture
def before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the stored outputs of an earlier version, as the working directory."""
    directory = tmp_path / "before"
    shutil.copytree(BEFORE, directory, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    monkeypatch.chdir(directory)
    yield directory


@pytest.fixture(scope="module")
def regenerated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The same outputs made by the current code, and the JSON that the commands print."""
    directory = tmp_path_factory.mktemp("anew") / "made"
    return directory, run_all(directory)


def test_on_disk_names_keys_and_columns_match_contract(
    regenerated: tuple[Path, dict[str, Any]],
) -> None:
    directory, printed = regenerated
    expected = json.loads((HERE / "on_disk.json").read_text())
    found = on_disk(directory, printed)
    assert found["files"].keys() == expected["files"].keys()
    for name, fields in expected["files"].items():
        assert found["files"][name] == fields, name
    assert found["printed"] == expected["printed"]


def test_backward_compatibility_of_bytes_and_numbers(
    regenerated: tuple[Path, dict[str, Any]],
) -> None:
    directory, _ = regenerated
    for path in sorted((BEFORE / "chats").iterdir()):
        assert (directory / "chats" / path.name).read_bytes() == path.read_bytes()
    for split in ("test", "train"):
        assert_same_shard(directory / "data" / split, BEFORE / "data" / split)
    was, now = (load_file(d / "run" / "trained.safetensors") for d in (BEFORE, directory))
    for name, weight in was.items():
        assert now[name] == pytest.approx(weight, abs=1e-5), name
    assert losses(directory) == pytest.approx(losses(BEFORE), rel=1e-4)
    assert scores(directory) == pytest.approx(scores(BEFORE), rel=1e-3, nan_ok=True)


def assert_same_shard(found: Path, expected: Path) -> None:
    """Assert that shards are equal to the byte, but for what a processor's kind decides.

    Another kind changes the last bits of the encoders' float32 numbers: a few are then rounded to
    another float16, and among those near zero to one some steps away.
    """
    now, was = ShardReader(str(found)), ShardReader(str(expected))
    assert list(now.keys) == list(was.keys)
    rows = np.arange(len(was))
    before, is_equal = was.read(rows), True
    for name, array in now.read(rows).items():
        is_equal &= np.array_equal(array, before[name])
        if array.dtype == np.float16:
            largest = np.abs(before[name]).max()
            np.testing.assert_allclose(array, before[name], rtol=2**-10, atol=1e-5 * largest)
        else:
            np.testing.assert_array_equal(array, before[name])
    for row in range(len(was)):
        assert now.read_json(row) == was.read_json(row)
        assert now.read_image(row) == was.read_image(row)
    if is_equal:
        index = "000000-*.arrow"
        assert [p.name for p in found.glob(index)] == [p.name for p in expected.glob(index)]


@pytest.mark.usefixtures("before")
def test_backward_compatibility_of_data_set() -> None:
    for split in ("test", "train"):
        assert run_d2i("verify", f"data/{split}", "--json")["problems"] == []
    assert "test0" in run_process("inspect", "data/test").stdout
    (index,) = Path("data/test").glob("*.arrow")
    was = index.read_bytes()
    index.unlink()
    assert run_process("verify", "data/test").returncode == 1
    run_d2i("repair", "data/test")
    assert index.read_bytes() == was


def test_backward_compatibility_of_run(before: Path) -> None:
    out = before / "again"
    words = commands()["eval"]
    words[words.index("--out") + 1] = str(out)
    run_d2i(*words)
    assert scores(before, "again") == pytest.approx(scores(before), rel=1e-3, nan_ok=True)
    assert images_by_name(out).keys() == images_by_name(before / "evaluation").keys()
    result = run_d2i(*commands()["train"], "--set", "train.num_steps=3", "--json")
    assert (result["step"], result["num_images"]) == (3, 6)
    lines = (before / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]


def test_backward_compatibility_of_evaluation_report(before: Path) -> None:
    run_d2i("report", "evaluation", "--out", "report.html")
    page = (before / "report.html").read_text()
    assert f"{abs(scores(before)['clip_i']):.2f}" in page


def losses(directory: Path) -> list[float]:
    lines = (directory / "run" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def scores(directory: Path, name: str = "evaluation") -> dict[str, float]:
    found = json.loads((directory / name / "scores.json").read_text())["scores"]
    return {name: value for name, value in found.items() if value is not None}
