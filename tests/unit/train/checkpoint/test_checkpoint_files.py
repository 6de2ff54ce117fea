"""Checkpoints on disk: any slice can be read, and a damaged one is never taken as complete."""

from __future__ import annotations

import resource
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from d2i.errors import CheckpointError
from d2i.io import storage
from d2i.train.checkpoint.checkpoint_files import (
    MARKER,
    Checkpoint,
    Progress,
    complete_checkpoints,
    latest_valid_checkpoint,
    prune,
    remove_step,
    slice_key,
    step_directory,
    step_of,
    write_marker,
    write_part,
    written_ranks,
)

WEIGHT = torch.arange(12.0).reshape(3, 4)
PROGRESS = Progress(3, 1.5, (0.25, 0.5), 3, {"cur_scale": 2.0})


def write(run_dir: Path, step: int, cuts: list[int]) -> Path:
    """Write a checkpoint of one parameter, cut into slices, each by another rank."""
    directory = run_dir / "checkpoints" / f"step-{step}"
    bounds = [0, *sorted(set(cuts)), 12]
    for rank, (start, end) in enumerate(pairwise(bounds)):
        numbers = WEIGHT.flatten()[start:end].clone()
        write_part(str(directory), rank, {slice_key("ema", "a.weight", start): numbers})
    write_marker(str(directory), PROGRESS, {"a.weight": (3, 4)}, len(bounds) - 1)
    return directory


@given(cuts=st.lists(st.integers(1, 11), max_size=4), ends=st.tuples(*[st.integers(0, 12)] * 2))
def test_checkpoint_reads_any_slice_across_ranks(
    tmp_path_factory: pytest.TempPathFactory, cuts: list[int], ends: tuple[int, int]
) -> None:
    checkpoint = Checkpoint(str(write(tmp_path_factory.mktemp("run"), 3, cuts)))
    start, end = sorted(ends)
    assert torch.equal(
        checkpoint.read("ema", "a.weight", start, end - start), WEIGHT.flatten()[start:end]
    )
    assert torch.equal(dict(checkpoint.read_whole("ema"))["a.weight"], WEIGHT)
    assert checkpoint.progress == PROGRESS


def test_checkpoint_slice_that_no_rank_wrote_is_error(tmp_path: Path) -> None:
    checkpoint = Checkpoint(str(write(tmp_path, 3, [])))
    with pytest.raises(CheckpointError, match="0 of 12 numbers of weight"):
        checkpoint.read("weight", "a.weight", 0, 12)


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "marker"])
def test_damaged_checkpoint_falls_back_to_previous_with_warning(
    tmp_path: Path, damage: str
) -> None:
    write(tmp_path, 3, [])
    newest = write(tmp_path, 6, [5])
    part = next(newest.glob("part-1-*"))
    content = bytearray(part.read_bytes())
    if damage == "flip":
        content[-3] ^= 1
    part.write_bytes(content[:-4] if damage == "cut" else content)
    if damage == "remove":
        part.unlink()
    if damage == "marker":
        (newest / MARKER).write_text('{"step"')
    warnings: list[str] = []
    found = latest_valid_checkpoint(str(tmp_path), warnings.append)
    assert found is not None
    assert found.directory == str(tmp_path / "checkpoints" / "step-3")
    assert len(warnings) == 1
    assert str(newest) in warnings[0]


@pytest.mark.parametrize("name", [MARKER, "part-0-*"])
def test_checkpoint_with_flipped_bit_is_never_valid(tmp_path: Path, name: str) -> None:
    """Neither in the marker's numbers nor in the names and offsets of a file's header."""
    before = write(tmp_path, 3, [])
    path = next(write(tmp_path, 6, []).glob(name))
    content = path.read_bytes()
    for bit in range(0, 8 * len(content), 5):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        warnings: list[str] = []
        found = latest_valid_checkpoint(str(tmp_path), warnings.append)
        assert found is not None
        assert found.directory == str(before), bit
        assert len(warnings) == 1


def test_resume_with_only_damaged_checkpoints_is_error(tmp_path: Path) -> None:
    (write(tmp_path, 3, []) / MARKER).write_text("")
    with pytest.raises(CheckpointError, match="no intact checkpoint among 1"):
        latest_valid_checkpoint(str(tmp_path), lambda _: None)


def test_prune_keeps_newest_checkpoints_and_removes_leftovers(tmp_path: Path) -> None:
    for step in (2, 10, 4):
        write(tmp_path, step, [])
    for name in ("step-12", "mine"):
        (tmp_path / "checkpoints" / name).mkdir()
    prune(str(tmp_path), 2, 10)
    assert [step_of(directory) for directory in complete_checkpoints(str(tmp_path))] == [4, 10]
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert left == ["mine", "step-10", "step-4"]


def test_prune_removes_later_checkpoint_that_was_skipped(tmp_path: Path) -> None:
    for step in (2, 4, 6):
        write(tmp_path, step, [])
    prune(str(tmp_path), 1, 4)
    assert [step_of(directory) for directory in complete_checkpoints(str(tmp_path))] == [4]


def test_checkpoints_on_remote_url_work_as_on_disk() -> None:
    run = "memory://checkpoints-run"
    for step in (2, 4, 6):
        directory = remove_step(run, step)
        for rank, part in enumerate(WEIGHT.flatten().split(5)):
            write_part(directory, rank, {slice_key("ema", "a.weight", 5 * rank): part.clone()})
        assert written_ranks(directory) == {0, 1, 2}
        assert complete_checkpoints(run) == [step_directory(run, n) for n in range(2, step, 2)]
        write_marker(directory, PROGRESS, {"a.weight": (3, 4)}, 3)
    found = latest_valid_checkpoint(run, pytest.fail)
    assert found is not None
    assert torch.equal(dict(found.read_whole("ema"))["a.weight"], WEIGHT)
    assert torch.equal(found.read("ema", "a.weight", 4, 7), WEIGHT.flatten()[4:11])
    remove_step(run, 4)
    prune(run, 1, 6)
    assert storage.list_names(f"{run}/checkpoints") == ["step-6"]


def test_full_disk_leaves_no_checkpoint_part_under_final_name(tmp_path: Path) -> None:
    """RLIMIT_FSIZE makes the kernel reject the write, as on a full disk."""
    program = (
        "import sys; import torch\n"
        "from d2i.config import TrainConfig\n"
        "from d2i.train.checkpoint.checkpoint_files import write_part\n"
        "from d2i.train.failures import explain_error\n"
        "config = TrainConfig(num_steps=1, global_batch_size=1, micro_batch_size=1)\n"
        "try:\n    write_part(sys.argv[1], 0, {'ema:a:0': torch.zeros(1 << 20)})\n"
        "except OSError as err:\n    print(explain_error(err, sys.argv[1], config))\n"
    )

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))

    command = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(command, preexec_fn=limit, capture_output=True, text=True, check=True)
    assert "cannot write" in done.stdout
    assert "partly written files are ignored" in done.stdout
    assert not list(tmp_path.glob("part-*"))
