"""One shard, mapped: checked once against its commit record, before any offset is used.

Must not import torch or ray.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from d2i.errors import ShardError
from d2i.shards.commit import ArrayInfo, Commit
from d2i.shards.index import Extent, Index, read_index
from d2i.shards.sample import MEMBERS, NPY_HEADER_SIZE_BYTES, npy_header, npy_size_bytes
from d2i.shards.tar import BLOCK_SIZE_BYTES
from d2i.shards.tar import header as tar_header


@dataclass(frozen=True)
class MappedShard:
    """A mapped shard: the tar's bytes, its index, and where each array's numbers begin."""

    tar: NDArray[np.uint8]
    index: Index
    starts: Mapping[str, NDArray[np.uint64]]

    def member(self, extent: Extent) -> bytes:
        """Copy a member's content."""
        end = extent.offset + extent.size_bytes
        return self.tar[extent.offset : end].tobytes()


class Shards(Protocol):
    """The shards of a data set by their number in the manifest, wherever they lie."""

    def index(self, number: int) -> Index:
        """Give the index of a shard, without its tar."""

    def using(self, number: int) -> AbstractContextManager[MappedShard]:
        """Give a shard that stays mapped until it is left."""

    def prefetch(self, numbers: Sequence[int]) -> None:
        """Hear which shards are used next, the first one first."""


class LocalShards:
    """The shards of a folder, each mapped when it is first touched.

    Holds no lock, so that forks and pickles are of use: of threads that touch a shard at once each
    maps it, and one map stays.
    """

    def __init__(self, folder: Path, commits: Sequence[Commit]) -> None:
        self._folder = folder
        self._commits = commits
        self._indexes: dict[int, Index] = {}
        self._open: dict[int, MappedShard] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return LocalShards, (self._folder, self._commits)

    def index(self, number: int) -> Index:
        """Give the index of a shard."""
        index = self._indexes.get(number)
        if index is None:
            index = self._indexes.setdefault(number, self._open_index(self._commits[number]))
        return index

    def using(self, number: int) -> AbstractContextManager[MappedShard]:
        """Give a shard, which stays mapped."""
        shard = self._open.get(number)
        if shard is None:
            mapped = self._map(self._commits[number], self.index(number))
            shard = self._open.setdefault(number, mapped)
        return nullcontext(shard)

    def prefetch(self, numbers: Sequence[int]) -> None:
        """Nothing is fetched: all is here."""

    def _open_index(self, commit: Commit) -> Index:
        with in_words(str(self._folder), commit):
            return open_index(commit, map_file(self._folder / commit.index_name))

    def _map(self, commit: Commit, index: Index) -> MappedShard:
        with in_words(str(self._folder), commit):
            return open_shard(commit, map_file(self._folder / commit.tar_name), index)


@contextmanager
def in_words(url: str, commit: Commit) -> Iterator[None]:
    """Say of which shard and data set a problem is, and what to do.

    Raises:
        ShardError: In place of a file that is not there, or of a shard unlike its record.
    """
    try:
        yield
    except FileNotFoundError as err:
        raise ShardError(
            f"{url} lacks a file of shard {commit.name}; expected its tar and its index; "
            "run `d2i repair`"
        ) from err
    except ShardError as err:
        raise ShardError(f"shard {commit.name} of {url}: {err}; run `d2i verify`") from err


def map_file(path: Path) -> Any:
    """Map a file without keeping it open: the map lives as long as the buffer.

    Python's own mmap holds a descriptor each, which runs out at a thousand shards.
    """
    with pa.memory_map(str(path)) as file:
        return file.read_buffer()


def open_index(commit: Commit, index_file: Any) -> Index:
    """Check a mapped index against its commit record.

    Raises:
        ShardError: If its sha256 or an extent differs.
    """
    if hashlib.sha256(index_file).hexdigest() != commit.index_file.sha256:
        raise ShardError("the index does not have the sha256 of the manifest")
    return read_index(
        index_file, num_samples=commit.num_samples, tar_size_bytes=commit.tar.size_bytes
    )


def open_shard(commit: Commit, tar: Any, index: Index) -> MappedShard:
    """Check a mapped tar against its commit record and its index.

    Raises:
        ShardError: If its size, an array's size, the first npy header, or the names at either
            end of the tar differ: it may be another shard's.
    """
    if tar.size != commit.tar.size_bytes:
        raise ShardError(f"the tar has {tar.size} bytes; expected {commit.tar.size_bytes}")
    tar_bytes = np.frombuffer(tar, np.uint8)
    _check_names(index, tar_bytes)
    starts: dict[str, NDArray[np.uint64]] = {
        name: _array_starts(name, array, index, tar_bytes) for name, array in commit.arrays.items()
    }
    return MappedShard(tar_bytes, index, starts)


def _check_names(index: Index, tar_bytes: NDArray[np.uint8]) -> None:
    for row in {0, len(index) - 1} if len(index) else ():
        found = index.row(row)
        for suffix, extent in found.extents.items():
            header = tar_bytes[max(0, extent.offset - BLOCK_SIZE_BYTES) : extent.offset].tobytes()
            if header != tar_header(f"{found.key}.{suffix}", extent.size_bytes):
                raise ShardError(f"the tar does not hold {found.key}.{suffix} where its index says")


def _array_starts(
    name: str, array: ArrayInfo, index: Index, tar: NDArray[np.uint8]
) -> NDArray[np.uint64]:
    """Give where each sample's numbers begin: all sizes are checked, and the first header."""
    suffix = MEMBERS[name].suffix
    offsets, sizes = index.column(suffix, "offset"), index.column(suffix, "size")
    if not np.all(offsets) or not np.all(sizes == npy_size_bytes(array.shape)):
        raise ShardError(f"the index has {suffix} members absent or not of shape {array.shape}")
    if len(index):
        first = tar[int(offsets[0]) :][:NPY_HEADER_SIZE_BYTES].tobytes()
        if first != npy_header(array.dtype, array.shape):
            raise ShardError(f"{suffix} is not npy {array.dtype} {array.shape} as in the manifest")
    return offsets + np.uint64(NPY_HEADER_SIZE_BYTES)
