"""Atomic, sharded checkpoints for any number of ranks, in safetensors and JSON only.

`checkpoints/step-N/` holds one file for each rank, named by its sha256. The marker `complete.json`,
which holds its own sha256, is written last.
A file holds flat float32 slices, each named `KIND:PARAMETER:START`: a weight, its AdamW moments or
its averages. So a run can resume with another world size or ZeRO stage, and nothing is unpickled.
Must not import DeepSpeed or `torch.distributed`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from d2i.config import WeightsKind
from d2i.errors import CheckpointError
from d2i.io import storage
from d2i.io.checksums import file_sha256

Kind = Literal["weight", "exp_avg", "exp_avg_sq", "ema", "ema_short"]
MARKER = "complete.json"
KIND_OF_WEIGHTS: dict[WeightsKind, Kind] = {
    "ema": "ema",
    "ema-short": "ema_short",
    "trained": "weight",
}
"""The checkpoint kind of each value of `sample.weights`."""
_STEP = re.compile(r"step-(\d+)")
_LENGTH_BYTES = 8
_PART = re.compile(r"part-(\d+)-[0-9a-f]{16}\.safetensors")


@dataclass(frozen=True)
class Progress:
    """Progress of a run: counters, the same on all ranks.

    Args:
        step: Optimizer steps taken.
        elapsed_s: Seconds of training, including those before an interruption.
        losses: Loss of each step since the last line of `metrics.jsonl`, mean over all ranks.
        num_updates: AdamW's update count: in float16, steps that overflow are skipped.
        loss_scale: State of float16's dynamic loss scale.
    """

    step: int = 0
    elapsed_s: float = 0.0
    losses: tuple[float, ...] = ()
    num_updates: int = 0
    loss_scale: Mapping[str, float] = field(default_factory=dict)


def slice_key(kind: Kind, parameter: str, start: int) -> str:
    """Return the name of a slice within a file."""
    return f"{kind}:{parameter}:{start}"


def step_directory(run_url: str, step: int) -> str:
    """Return the directory of a step's checkpoint, which only counts once its marker exists."""
    return storage.join(run_url, "checkpoints", f"step-{step}")


def remove_step(run_url: str, step: int) -> str:
    """Remove a step's checkpoint, its marker first, and return its directory, now empty."""
    directory = step_directory(run_url, step)
    _remove(directory)
    storage.make_directory(directory)
    return directory


def write_part(directory: str, rank: int, runs: Mapping[str, Tensor]) -> None:
    """Write one rank's slices to a file, published atomically under its final name."""
    with storage.scratch_file(directory) as scratch:
        _save(dict(runs), scratch)
        name = f"part-{rank}-{file_sha256(str(scratch))[:16]}.safetensors"
        storage.publish_atomically(scratch, storage.join(directory, name))


def _save(runs: dict[str, Tensor], path: Path) -> None:
    """Write safetensors; raise an error of the operating system as OSError with its errno."""
    try:
        save_file(runs, path)
    except SafetensorError as err:
        number = re.search(r"os error (\d+)", str(err))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from err


def written_ranks(directory: str) -> set[int]:
    """Return the ranks whose file exists."""
    return {int(name[1]) for name in _parts(directory).values()}


def _parts(directory: str) -> dict[str, re.Match[str]]:
    names = {name: _PART.fullmatch(name) for name in storage.list_names(directory)}
    return {name: found for name, found in names.items() if found}


def write_marker(
    directory: str,
    progress: Progress,
    shapes: Mapping[str, tuple[int, ...]],
    world_size: int,
    base_sha256: str | None = None,
) -> None:
    """Write the marker that completes a checkpoint; all of its files must exist."""
    parts = sorted(_parts(directory))
    marker = asdict(progress) | {
        "shapes": {name: list(shape) for name, shape in shapes.items()},
        "files": {part: storage.size_bytes(storage.join(directory, part)) for part in parts},
        "world_size": world_size,
    }
    if base_sha256:
        marker["base_sha256"] = base_sha256
    data = json.dumps(marker | {"sha256": _marker_sha256(marker)}) + "\n"
    storage.write_bytes(storage.join(directory, MARKER), data.encode())


def _read_marker(directory: str) -> dict[str, Any]:
    marker: dict[str, Any] = json.loads(storage.read_bytes(storage.join(directory, MARKER)))
    if marker.pop("sha256") != _marker_sha256(marker):
        raise ValueError(f"{MARKER} does not match the sha256 stored in it")
    return marker


def _marker_sha256(marker: Mapping[str, Any]) -> str:
    """Return the sha256 of a marker without its own `sha256` entry."""
    return hashlib.sha256(json.dumps(marker, sort_keys=True).encode()).hexdigest()


def complete_checkpoints(run_url: str) -> list[str]:
    """Return the directories of all complete checkpoints, newest last."""
    return [directory for directory in _step_directories(run_url) if _is_complete(directory)]


def step_of(directory: str) -> int:
    """Return the step of a checkpoint's directory."""
    return int(directory.rpartition("step-")[2])


def prune(run_url: str, num_kept: int, newest: int) -> None:
    """Keep the newest complete checkpoints up to the step just written; remove all others.

    Removed are older ones, leftovers of killed attempts, and later ones. A later one was skipped
    as damaged when the run resumed; it must not count in place of an intact one.
    """
    whole = [
        directory for directory in complete_checkpoints(run_url) if step_of(directory) <= newest
    ]
    kept = whole[-num_kept:]
    for directory in _step_directories(run_url):
        if directory not in kept:
            _remove(directory)


def _remove(directory: str) -> None:
    storage.remove(storage.join(directory, MARKER))
    storage.remove_directory(directory)


def _is_complete(directory: str) -> bool:
    return storage.exists(storage.join(directory, MARKER))


def _step_directories(run_url: str) -> list[str]:
    names = storage.list_names(storage.join(run_url, "checkpoints"))
    steps = sorted(int(found[1]) for found in map(_STEP.fullmatch, names) if found)
    return [step_directory(run_url, step) for step in steps]


class _Part:
    """A local or remote file of a checkpoint, read by byte ranges.

    Args:
        url: The file.
        size_bytes: Its size.

    Raises:
        ValueError: If it is not a file as `write_part` writes it.
    """

    def __init__(self, url: str, size_bytes: int) -> None:
        self._url = url
        length = int.from_bytes(storage.read_range(url, 0, _LENGTH_BYTES), "little")
        self._begin = _LENGTH_BYTES + length
        if self._begin > size_bytes:
            raise ValueError(f"{url.rpartition('/')[2]} is not a safetensors file")
        header = json.loads(storage.read_range(url, _LENGTH_BYTES, length))
        header.pop("__metadata__", None)
        self._offsets = {name: run["data_offsets"][0] for name, run in header.items()}
        self.lengths: dict[str, int] = {name: run["shape"][0] for name, run in header.items()}

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Read elements start to stop - 1 of a slice, float32; fewer if the file is cut short."""
        offset = self._begin + self._offsets[name] + 4 * start
        data = storage.read_range(self._url, offset, 4 * (stop - start))
        return torch.from_numpy(np.frombuffer(data, "<f4", len(data) // 4).copy())


class Checkpoint:
    """A complete checkpoint, readable by any number of ranks.

    Args:
        directory: Its directory, as `complete_checkpoints` returns it.

    Attributes:
        shapes: Shape of every trained parameter, by its published key.
        progress: The counters of the run.
        base_sha256: Of the base model's network, where one was fine-tuned within its pipeline.

    Raises:
        CheckpointError: If its marker or a file cannot be read.
    """

    def __init__(self, directory: str) -> None:
        self.directory = directory
        try:
            marker = _read_marker(directory)
            self.shapes = {name: tuple(shape) for name, shape in marker["shapes"].items()}
            self._sizes: dict[str, int] = marker["files"]
            self.progress = Progress(
                step=marker["step"],
                elapsed_s=marker["elapsed_s"],
                losses=tuple(marker["losses"]),
                num_updates=marker["num_updates"],
                loss_scale=marker["loss_scale"],
            )
            self.base_sha256: str | None = marker.get("base_sha256")
            self._runs = self._find_runs()
        except (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError) as err:
            raise self._damaged(err) from err

    def _find_runs(self) -> dict[tuple[str, str], list[tuple[int, _Part]]]:
        """Return the start and the file of each slice, by (kind, parameter)."""
        runs: dict[tuple[str, str], list[tuple[int, _Part]]] = defaultdict(list)
        for file, size in self._sizes.items():
            part = _Part(storage.join(self.directory, file), size)
            for name in part.lengths:
                kind, parameter, start = name.split(":")
                runs[kind, parameter].append((int(start), part))
        return runs

    def check(self) -> None:
        """Read every byte once and compare it with the checksums, and slices with the shapes.

        Raises:
            CheckpointError: If the size or sha256 of a file differs from what was written, or the
                slices of a parameter do not make up its shape.
        """
        for (kind, parameter), slices in self._runs.items():
            names = (slice_key(cast(Kind, kind), parameter, first) for first, _ in slices)
            lengths = (part.lengths[n] for n, (_, part) in zip(names, slices, strict=True))
            expected = torch.Size(self.shapes.get(parameter, ())).numel()
            if (length := sum(lengths)) != expected:
                raise self._damaged(
                    f"it holds {length} numbers of {kind} {parameter}, whose shape has {expected}"
                )
        for name, size_bytes in self._sizes.items():
            url = storage.join(self.directory, name)
            if (found := storage.size_bytes(url)) != size_bytes:
                raise self._damaged(f"{name} has {found} bytes, not {size_bytes}")
            if file_sha256(url)[:16] not in name:
                raise self._damaged(f"{name} does not match the sha256 in its name")

    def read(self, kind: Kind, parameter: str, start: int, length: int) -> Tensor:
        """Read elements start to start + length - 1 of a flattened parameter, float32 (length,).

        Raises:
            CheckpointError: If some of them are in no file.
        """
        numbers = torch.empty(length)
        num_read = 0
        for first, part in self._runs[kind, parameter]:
            name = slice_key(kind, parameter, first)
            low, high = max(start, first), min(start + length, first + part.lengths[name])
            if low < high:
                found = part.read(name, low - first, high - first)
                numbers[low - start :][: len(found)] = found
                num_read += len(found)
        if num_read != length:
            raise self._damaged(f"it holds {num_read} of {length} numbers of {kind} {parameter}")
        return numbers

    def read_whole(self, kind: Kind) -> Iterator[tuple[str, Tensor]]:
        """Read every parameter of a kind; yield (published key, tensor in its own shape)."""
        for name, shape in self.shapes.items():
            length = int(torch.Size(shape).numel())
            yield name, self.read(kind, name, 0, length).reshape(shape)

    def _damaged(self, reason: object) -> CheckpointError:
        return CheckpointError(
            f"{self.directory} is damaged: {reason}; delete this directory and run the same "
            "command again: it resumes from the previous checkpoint"
        )


def latest_valid_checkpoint(run_url: str, warn: Any) -> Checkpoint | None:
    """Return the newest complete checkpoint whose checksums match.

    Args:
        run_url: The run directory.
        warn: Called with a one-line message for each newer checkpoint that is damaged.

    Returns:
        None if there is no complete checkpoint.

    Raises:
        CheckpointError: If there are complete checkpoints and all are damaged.
    """
    directories = complete_checkpoints(run_url)
    for directory in reversed(directories):
        try:
            checkpoint = Checkpoint(directory)
            checkpoint.check()
        except CheckpointError as err:
            warn(str(err).partition("; ")[0])
            continue
        return checkpoint
    if directories:
        raise CheckpointError(
            f"{run_url}: no intact checkpoint among {len(directories)}; expected at least one; "
            "restore one, or start over with another --run"
        )
    return None
