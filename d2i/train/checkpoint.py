"""Checkpoints on disk: whole or absent, of any number of ranks, safetensors and JSON only.

`checkpoints/step-N/` holds one file a rank, named by its sha256, and last of all `complete.json`.
A file holds flat float32 runs of numbers, each named `KIND:PARAMETER:START`: a weight, its AdamW
moments or its average. So no file knows which ranks or which ZeRO stage wrote it, any others can
go on from it, and nothing is unpickled. Must not import DeepSpeed or `torch.distributed`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from d2i import storage
from d2i.errors import CheckpointError

Kind = Literal["weight", "exp_avg", "exp_avg_sq", "ema"]
KINDS: tuple[Kind, ...] = ("weight", "exp_avg", "exp_avg_sq", "ema")
MARKER = "complete.json"
_IS_OURS = re.compile(r"step-\d+|\.step-\d+\.tmp")
_PART = re.compile(r"part-(\d+)-[0-9a-f]{16}\.safetensors")


@dataclass(frozen=True)
class Progress:
    """How far a run is: counters, the same on all ranks.

    Args:
        step: Optimizer steps taken.
        elapsed_s: Seconds of training, those before an interruption included.
        losses: Loss of each step since the last line of `metrics.jsonl`, over all ranks.
        num_updates: Updates that AdamW counts: fp16 leaves out those that overflow.
        loss_scale: The numbers of fp16's dynamic loss scale.
    """

    step: int = 0
    elapsed_s: float = 0.0
    losses: tuple[float, ...] = ()
    num_updates: int = 0
    loss_scale: Mapping[str, float] = field(default_factory=dict)


def run_name(kind: Kind, parameter: str, start: int) -> str:
    """Return the name of a run of numbers within a file."""
    return f"{kind}:{parameter}:{start}"


def step_folder(run_dir: Path, step: int) -> Path:
    """Return where the checkpoint of a step lies once it is whole."""
    return run_dir / "checkpoints" / f"step-{step}"


def scratch_folder(run_dir: Path, step: int) -> Path:
    """Return where the checkpoint of a step is written."""
    return run_dir / "checkpoints" / f".step-{step}.tmp"


def write_part(scratch: Path, rank: int, runs: Mapping[str, Tensor]) -> None:
    """Write one rank's numbers, which appear under their final name complete."""
    unnamed = scratch / f".part-{rank}"
    _save(dict(runs), unnamed)
    storage.sync(unnamed)
    unnamed.rename(scratch / f"part-{rank}-{_sha256(unnamed)[:16]}.safetensors")


def _save(runs: dict[str, Tensor], path: Path) -> None:
    """Write safetensors; what the system refuses is told as the system tells it."""
    try:
        save_file(runs, path)
    except SafetensorError as err:
        path.unlink(missing_ok=True)
        number = re.search(r"os error (\d+)", str(err))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from err


def written_ranks(scratch: Path) -> set[int]:
    """Return the ranks whose file is there."""
    names = (_PART.fullmatch(path.name) for path in scratch.iterdir())
    return {int(name[1]) for name in names if name}


def write_marker(
    folder: Path, progress: Progress, shapes: Mapping[str, tuple[int, ...]], world_size: int
) -> None:
    """Make a checkpoint whole: all of its files are there and in their place."""
    marker = asdict(progress) | {
        "shapes": {name: list(shape) for name, shape in shapes.items()},
        "files": {path.name: path.stat().st_size for path in sorted(folder.glob("part-*"))},
        "world_size": world_size,
    }
    storage.write_bytes(str(folder / MARKER), (json.dumps(marker) + "\n").encode())


def whole_checkpoints(run_dir: Path) -> list[Path]:
    """Return the folders of all whole checkpoints, the newest last."""
    markers = (run_dir / "checkpoints").glob(f"step-*/{MARKER}")
    return sorted((m.parent for m in markers), key=lambda p: int(p.name.removeprefix("step-")))


def prune(run_dir: Path, num_kept: int) -> None:
    """Keep the newest whole checkpoints, and remove what killed attempts left of others."""
    for folder in whole_checkpoints(run_dir)[:-num_kept]:
        (folder / MARKER).unlink()
    for folder in (run_dir / "checkpoints").iterdir():
        if _IS_OURS.fullmatch(folder.name) and not (folder / MARKER).exists():
            shutil.rmtree(folder)


class Checkpoint:
    """A whole checkpoint, to be read by any number of ranks.

    Args:
        folder: As `whole_checkpoints` gives it.

    Raises:
        CheckpointError: If its marker or a file cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            marker = json.loads((folder / MARKER).read_text())
            self.shapes = {name: tuple(shape) for name, shape in marker["shapes"].items()}
            self._sizes: dict[str, int] = marker["files"]
            self.progress = Progress(
                step=marker["step"],
                elapsed_s=marker["elapsed_s"],
                losses=tuple(marker["losses"]),
                num_updates=marker["num_updates"],
                loss_scale=marker["loss_scale"],
            )
            self._files = [safe_open(folder / name, "pt") for name in self._sizes]
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as err:
            raise self._damaged(err) from err
        self._runs: dict[tuple[str, str], list[tuple[int, Any]]] = defaultdict(list)
        for file in self._files:
            for name in file.keys():  # noqa: SIM118 - no mapping, it only has keys
                kind, parameter, start = name.split(":")
                self._runs[kind, parameter].append((int(start), file))

    def check(self) -> None:
        """Read every byte once.

        Raises:
            CheckpointError: If a file is not the one that was written.
        """
        for name, size_bytes in self._sizes.items():
            path = self.folder / name
            if path.stat().st_size != size_bytes:
                raise self._damaged(f"{name} has {path.stat().st_size} bytes, not {size_bytes}")
            if _sha256(path)[:16] not in name:
                raise self._damaged(f"{name} does not have the sha256 of its name")

    def read(self, kind: Kind, parameter: str, start: int, length: int) -> Tensor:
        """Read numbers start to start + length of a flattened parameter, float32 (length,).

        Raises:
            CheckpointError: If some of them are in no file.
        """
        numbers = torch.empty(length)
        num_read = 0
        for first, file in self._runs[kind, parameter]:
            run = file.get_slice(run_name(kind, parameter, first))
            low, high = max(start, first), min(start + length, first + run.get_shape()[0])
            if low < high:
                numbers[low - start : high - start] = run[low - first : high - first]
                num_read += high - low
        if num_read != length:
            raise self._damaged(f"it holds {num_read} of {length} numbers of {kind} {parameter}")
        return numbers

    def read_whole(self, kind: Kind) -> Iterator[tuple[str, Tensor]]:
        """Read every parameter of a kind, in its shape, by its published key."""
        for name, shape in self.shapes.items():
            length = int(torch.Size(shape).numel())
            yield name, self.read(kind, name, 0, length).reshape(shape)

    def _damaged(self, reason: object) -> CheckpointError:
        return CheckpointError(
            f"{self.folder} is damaged: {reason}; expected a whole checkpoint; delete this folder "
            "and repeat the command: it goes on from the one before"
        )


def newest_sound_checkpoint(run_dir: Path, warn: Any) -> Checkpoint | None:
    """Return the newest checkpoint of which every byte is as it was written.

    Args:
        run_dir: The run directory.
        warn: Told of each newer one that is not, in a line.

    Returns:
        None where no checkpoint was ever made whole.

    Raises:
        CheckpointError: If there are some, and all are damaged.
    """
    folders = whole_checkpoints(run_dir)
    for folder in reversed(folders):
        try:
            checkpoint = Checkpoint(folder)
            checkpoint.check()
        except CheckpointError as err:
            warn(str(err).partition("; ")[0])
            continue
        return checkpoint
    if folders:
        raise CheckpointError(
            f"{run_dir}: none of {len(folders)} checkpoints is sound; expected one at least; "
            "restore them, or begin anew with another --run"
        )
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
