"""Data in format 2: the same samples as in format 1, for every command that reads them."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from d2i.models import read_state_dict
from d2i.shards import ShardReader, read_manifest
from tests.integration.commands import preprocess
from tests.integration.conftest import write_chat
from tests.processes import run_d2i, run_process
from tests.shared import needs_shared

pytestmark = needs_shared
SMALL = ("--set", "preprocess.num_samples_per_shard=5", "--set", "preprocess.keep_images=always")
FORMAT_2 = ("--set", "preprocess.format=2")


@dataclass(frozen=True)
class Prepared:
    """The same chats in both formats, and the settings that prepared them."""

    source: Path
    first: Path
    second: Path
    settings: list[str]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, settings: list[str]) -> Prepared:
    directory = tmp_path_factory.mktemp("formats")
    source = directory / "chats"
    source.mkdir()
    for split, count in (("train", 12), ("test", 6)):
        lines = [write_chat(source, f"{split}{number}") for number in range(count)]
        (source / f"{split}.jsonl").write_text("\n".join(lines))
    settings = [*settings, *SMALL]
    for out, extra in (("first", ()), ("second", FORMAT_2)):
        preprocess("jsonl", source, directory / out, *settings, *extra)
    return Prepared(source, directory / "first", directory / "second", settings)


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


def test_both_formats_hold_the_same_samples(prepared: Prepared, tmp_path: Path) -> None:
    for split in ("train", "test"):
        first, second = (ShardReader(str(p / split)) for p in (prepared.first, prepared.second))
        assert (first.manifest.format, second.manifest.format) == (1, 2)
        assert list(first.keys) == list(second.keys)
        positions = range(len(first))
        arrays, declared = first.read(positions), second.read(positions)
        assert arrays.keys() == declared.keys() == {"moments", "clip", "tokens", "text"}
        for name, array in arrays.items():
            np.testing.assert_array_equal(declared[name], array)
        for n in positions:
            assert first.read_json(n) == second.read_json(n)
            assert first.read_image(n) == second.read_image(n)
    assert run_d2i("verify", prepared.second, "--json")["problems"] == []
    page = tmp_path / "page.html"
    run_d2i("inspect", prepared.second / "test", "--html", page, "--json")
    assert page.stat().st_size > 10_000


def test_run_and_evaluation_do_not_depend_on_format(prepared: Prepared, tmp_path: Path) -> None:
    runs = []
    for data in (prepared.first, prepared.second):
        run = tmp_path / f"run-{data.name}"
        command = ("train", "--recipe", "demo", "--data", data, "--run", run)
        # The features of '' are read from shards of format 1, and encoded for those of format 2.
        dropout = ("--set", "train.condition_dropout=0.5")
        run_d2i(*command, "--num-accelerators", "1", *prepared.settings, *dropout, "--json")
        runs.append(read_state_dict(run / "ema.safetensors"))
        scores = tmp_path / f"scores-{data.name}"
        run_d2i("eval", "--system", f"run:{run}", "--data", data, "--out", scores, "--json")
    one, two = runs
    assert all(one[name].equal(two[name]) for name in one)
    first, second = (
        (tmp_path / f"scores-{data.name}" / "instances.jsonl").read_bytes()
        for data in (prepared.first, prepared.second)
    )
    assert first == second


def test_images_are_reused_across_formats(prepared: Prepared, tmp_path: Path) -> None:
    """Without the images: only the chats themselves are left."""
    source = tmp_path / "chats"
    source.mkdir()
    for path in prepared.source.glob("*.jsonl"):
        shutil.copy(path, source)
    out = tmp_path / "out"
    command = (*prepared.settings, *FORMAT_2, "--reuse", str(prepared.first))
    preprocess("jsonl", source, out, *command)
    for split in ("train", "test"):
        assert files(out / split) == files(prepared.second / split)


DAMAGE = {
    "all but the tars": ["*.commit.json", "*.arrow", "manifest.json*"],
    "all but plan and ledger": ["*.tar", "*.commit.json", "*.arrow", "manifest.json*"],
}


@pytest.mark.parametrize("case", DAMAGE)
def test_repair_restores_same_bytes(case: str, prepared: Prepared, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(prepared.second, tmp_path / "data"))
    for pattern in DAMAGE[case]:
        for path in (copy / "train").glob(pattern):
            path.unlink()
    assert run_process("verify", copy).returncode == 1
    run_d2i("repair", copy, "--workers", "0", "--json")
    assert files(copy / "train") == files(prepared.second / "train")


@pytest.mark.soak
def test_killed_preprocess_resumes(prepared: Prepared, tmp_path: Path) -> None:
    out = tmp_path / "data"
    command = (
        *("preprocess", "--corpus", "jsonl", "--source", prepared.source, "--out", out),
        *("--recipe", "demo", "--workers", "0", *prepared.settings, *FORMAT_2),
    )
    for point in ("shard.index:kill:2", "manifest.checksum:kill:1"):
        assert run_process(*command, "--fault", point).returncode < 0
    run_d2i(*command, "--json")
    for split in ("train", "test"):
        assert files(out / split) == files(prepared.second / split)
    refused = run_process(*command[:-2], "--set", "text.strategy=space", *FORMAT_2)
    assert refused.returncode == 2
    assert read_manifest(str(out / "test")).format == 2
