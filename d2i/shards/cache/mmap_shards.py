"""Memory-mapped shards: checked against the commit record before any offset is used.

Headers and checksums of a sample are compared when it is first read. Maps survive a fork. Must not
import torch or ray.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from d2i.errors import ShardError
from d2i.shards.commit import FileInfo
from d2i.shards.index import Index, IndexForm, IndexRow, read_index
from d2i.shards.layout import ArrayInfo
from d2i.shards.sample import NPY_HEADER_SIZE_BYTES, array_size_bytes, npy_header
from d2i.shards.tar import BLOCK_SIZE_BYTES
from d2i.shards.tar import header_form as tar_header_form
from d2i.shards.tar_set import INDEX_DIRECTORY, LIST_NAME


class ForkSafeShards:
    """Shards that each process opens for itself, whether it was forked or got a pickle.

    A forked child would inherit its parent's locks, leases and fetcher threads: it would wait for
    threads that it does not have, and read files that nothing protects from eviction.

    Args:
        open_shards: Opens the shards; it must be picklable.
    """

    def __init__(self, open_shards: Callable[[], Shards]) -> None:
        self._open_shards = open_shards
        self._opened = (os.getpid(), open_shards())

    def __reduce__(self) -> tuple[Any, ...]:
        return ForkSafeShards, (self._open_shards,)

    def index(self, number: int) -> Index:
        """Return the index of a shard, without its tar."""
        return self._own().index(number)

    def using(self, number: int) -> AbstractContextManager[MappedShard]:
        """Return a context with a shard that stays mapped inside it."""
        return self._own().using(number)

    def prefetch(self, numbers: Sequence[int]) -> None:
        """Announce the shards that are used next, first one first."""
        self._own().prefetch(numbers)

    def _own(self) -> Shards:
        process, shards = self._opened
        if process != os.getpid():
            # Threads that get here together each open them; any one result serves all.
            shards = self._open_shards()
            self._opened = (os.getpid(), shards)
        return shards


_USUAL_MAX_MAPS = 65_530


class ShardRecord(Protocol):
    """The record of a shard: a `Commit`, or an `IndexedTar` that d2i did not write."""

    @property
    def name(self) -> str:
        """Name of the shard."""

    @property
    def tar_name(self) -> str:
        """Name of the tar, in the data set's directory."""

    @property
    def index_name(self) -> str:
        """Name of the index, relative to the data set's directory."""

    @property
    def tar(self) -> FileInfo:
        """Size and hash of the tar."""

    @property
    def index_file(self) -> FileInfo:
        """Size and hash of the index."""

    @property
    def num_samples(self) -> int:
        """Samples in the tar."""

    @property
    def arrays(self) -> Mapping[str, ArrayInfo]:
        """Dtype and shape of each array."""

    @property
    def layout(self) -> IndexForm:
        """The members that its samples may have."""


class MappedArray:
    """One array member of a mapped shard: the offset of each sample's values.

    A sample's headers and checksum are compared when it is first read, and only then: checking all
    at once would read the whole tar. Headers that d2i did not write are not compared: their
    checksum includes the npy header, and the tar header tells nothing that the index does not.
    """

    def __init__(
        self,
        name: str,
        array: ArrayInfo,
        index: Index,
        tar: NDArray[np.uint8],
        form: IndexForm,
        *,
        check_data: bool = True,
    ) -> None:
        """Check every size; no byte of the tar is read yet.

        Raises:
            ShardError: If a sample lacks this member, or has one of another size.
        """
        self._suffix = form.array_suffix(name)
        self._array, self._index, self._tar = array, index, tar
        self._num_bytes = array_size_bytes(array.dtype, array.shape)
        size_bytes = NPY_HEADER_SIZE_BYTES + self._num_bytes
        offsets, sizes = index.column(self._suffix, "offset"), index.column(self._suffix, "size")
        fits = sizes == size_bytes if form.is_canonical else sizes > self._num_bytes
        if not np.all(offsets) or not np.all(fits):
            raise ShardError(
                f"some {self._suffix} members are absent from the index, or not of shape "
                f"{array.shape}"
            )
        # A view of the mapped file: a copy would take eight bytes per sample of all shards.
        self._offsets: NDArray[np.uint64] = offsets
        # None if all are of one size.
        self._sizes: NDArray[np.uint64] | None = None if form.is_canonical else sizes
        self._unchecked: NDArray[np.bool_] | None = np.ones(len(index), np.bool_)
        if form.is_canonical:
            self._tar_header = tar_header_form(size_bytes)
            self._npy_header = npy_header(array.dtype, array.shape)
        self._crcs = index.column(self._suffix, "crc32") if check_data else None

    def starts(self, rows: NDArray[np.int64]) -> list[int]:
        """Return the offsets in the tar of the values of some samples.

        Raises:
            ShardError: If the headers before them are not the ones that d2i writes, or they do not
                match the checksum in the index.
        """
        offsets = self._offsets[rows]
        if self._sizes is None:
            values = offsets + np.uint64(NPY_HEADER_SIZE_BYTES)
        else:
            values = offsets + self._sizes[rows] - np.uint64(self._num_bytes)
        starts: list[int] = values.tolist()
        unchecked = self._unchecked
        if unchecked is not None and unchecked[rows].any():
            for row, offset, start in zip(rows.tolist(), offsets.tolist(), starts, strict=True):
                self._check(f"{self._index.keys[row]}.{self._suffix}", row, offset, start)
            unchecked[rows] = False
            if not unchecked.any():
                self._unchecked = None
        return starts

    def _check(self, name: str, row: int, offset: int, start: int) -> None:
        if self._sizes is None:
            check_tar_header(self._tar, offset, name, self._tar_header)
            if self._tar[offset:start].tobytes() != self._npy_header:
                expected = f"{self._array.dtype} {self._array.shape}"
                raise ShardError(f"{name} is not npy {expected}, as the manifest says")
        if self._crcs is None:
            return
        if zlib.crc32(self._tar[offset : start + self._num_bytes].data) != self._crcs[row]:
            raise ShardError(f"{name} does not match its checksum")


@dataclass(frozen=True)
class MappedShard:
    """A mapped shard: the tar's bytes, its index, and its arrays by name."""

    tar: NDArray[np.uint8]
    index: Index
    arrays: Mapping[str, MappedArray]
    is_canonical: bool

    def member(self, row: IndexRow, suffix: str) -> bytes:
        """Copy a member's content.

        Raises:
            ShardError: If there is no regular file of that name at its offset, in a tar of d2i.
        """
        extent = row.extents[suffix]
        if self.is_canonical:
            form = tar_header_form(extent.size_bytes)
            check_tar_header(self.tar, extent.offset, f"{row.key}.{suffix}", form)
        return self.tar[extent.offset : extent.offset + extent.size_bytes].tobytes()


class Shards(Protocol):
    """The shards of a data set by their number in the manifest, local or remote."""

    def index(self, number: int) -> Index:
        """Return the index of a shard, without its tar."""

    def using(self, number: int) -> AbstractContextManager[MappedShard]:
        """Return a context with a shard that stays mapped inside it."""

    def prefetch(self, numbers: Sequence[int]) -> None:
        """Announce the shards that are used next, first one first."""


class LocalShards:
    """The shards of a local directory, each mapped on first use; the most recent stay mapped.

    Holds no lock, so that it can be forked and pickled: threads that use a new shard at the same
    time each map it, and one map stays.
    """

    def __init__(
        self, directory: Path, commits: Sequence[ShardRecord], *, check_data: bool = True
    ) -> None:
        self._directory, self._commits, self._check_data = directory, commits, check_data
        most = max_mapped_shards()
        # Caches of functions, not of methods: those would keep this object, and its maps, alive.
        self._index = lru_cache(most)(partial(_map_index, directory, commits))
        map_shard = partial(_map_shard, directory, commits, self._index, check_data)
        self._shard = lru_cache(most)(map_shard)

    def __reduce__(self) -> tuple[Any, ...]:
        again = partial(LocalShards, check_data=self._check_data)
        return again, (self._directory, self._commits)

    def index(self, number: int) -> Index:
        """Return the index of a shard."""
        return self._index(number)

    def using(self, number: int) -> AbstractContextManager[MappedShard]:
        """Return a context with a shard that stays mapped at least inside it."""
        return nullcontext(self._shard(number))

    def prefetch(self, numbers: Sequence[int]) -> None:
        """Do nothing: all shards are local."""


def max_mapped_shards() -> int:
    """Return how many shards of a data set may be mapped at once.

    Linux limits the maps of a process, and each shard has two. Two data sets may be read, and a
    fifth of the limit is left for libraries.
    """
    bound = Path("/proc/sys/vm/max_map_count")
    return int(bound.read_text() if bound.exists() else _USUAL_MAX_MAPS) // 5


def _map_index(directory: Path, commits: Sequence[ShardRecord], number: int) -> Index:
    commit = commits[number]
    with wrap_errors(str(directory), commit):
        return open_index(commit, map_file(directory / commit.index_name))


def _map_shard(
    directory: Path,
    commits: Sequence[ShardRecord],
    index: Callable[[int], Index],
    check_data: bool,
    number: int,
) -> MappedShard:
    commit = commits[number]
    with wrap_errors(str(directory), commit):
        tar = map_file(directory / commit.tar_name)
        return open_shard(commit, tar, index(number), check_data=check_data)


@contextmanager
def wrap_errors(url: str, commit: ShardRecord) -> Iterator[None]:
    """Add the shard, the data set and the next step to an error.

    Raises:
        ShardError: In place of the error of a missing file, or of a shard unlike its record.
    """
    try:
        yield
    except FileNotFoundError as err:
        raise ShardError(
            f"{url} is missing a file of shard {commit.name}; expected its tar and its index; "
            f"run `d2i {'repair' if commit.layout.is_canonical else 'verify'}`"
        ) from err
    except ShardError as err:
        raise ShardError(f"shard {commit.name} of {url}: {err}; run `d2i verify`") from err


def map_file(path: Path) -> Any:
    """Map a file without keeping it open: the map lives as long as the buffer.

    Python's own mmap keeps a descriptor per file, and these run out at a thousand shards.
    """
    with pa.memory_map(str(path)) as file:
        return file.read_buffer()


def open_index(commit: ShardRecord, index_file: Any) -> Index:
    """Check a mapped index against its commit record.

    Raises:
        ShardError: If its sha256 differs, or it is not a valid index.
    """
    if hashlib.sha256(index_file).hexdigest() != commit.index_file.sha256:
        record = "the manifest" if commit.layout.is_canonical else f"{INDEX_DIRECTORY}/{LIST_NAME}"
        raise ShardError(f"the index does not match the sha256 in {record}")
    return decode_index(commit, index_file)


def decode_index(commit: ShardRecord, index_file: Any) -> Index:
    """Decode the index of a shard, whose sha256 has been checked.

    Raises:
        ShardError: If it is not a valid index.
    """
    return read_index(
        index_file,
        commit.layout,
        num_samples=commit.num_samples,
        tar_size_bytes=commit.tar.size_bytes,
    )


def open_shard(
    commit: ShardRecord, tar: Any, index: Index, *, check_data: bool = True
) -> MappedShard:
    """Check a mapped tar against its commit record and its index.

    With `check_data` each array is compared with its checksum when it is first read.

    Raises:
        ShardError: If its size or an array's size differs.
    """
    if tar.size != commit.tar.size_bytes:
        raise ShardError(f"the tar has {tar.size} bytes; expected {commit.tar.size_bytes}")
    tar_bytes = np.frombuffer(tar, np.uint8)
    form = commit.layout
    arrays: dict[str, MappedArray] = {
        name: MappedArray(name, array, index, tar_bytes, form, check_data=check_data)
        for name, array in commit.arrays.items()
    }
    return MappedShard(tar_bytes, index, arrays, form.is_canonical)


def check_tar_header(
    tar: NDArray[np.uint8], offset: int, name: str, form: Callable[[str], bytes]
) -> None:
    """Reject a tar without the header of a regular file of this name before an offset.

    Raises:
        ShardError: If the header differs: the tar may be hostile, or that of another shard.
    """
    if tar[max(0, offset - BLOCK_SIZE_BYTES) : offset].tobytes() != form(name):
        raise ShardError(f"the tar does not hold {name} where its index says")
