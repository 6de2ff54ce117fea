"""Read samples of a data set in any order, straight out of mapped tars.

A shard is mapped when it is first touched and checked once; after that a batch is one copy a
member. Parses no header and unpickles nothing. Must not import torch or ray.
"""

from __future__ import annotations

import hashlib
import threading
import zlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray

from d2i import storage
from d2i.errors import ShardError
from d2i.settle import differences
from d2i.shards.commit import ArrayInfo, Commit, FileInfo, canonical_json
from d2i.shards.index import Extent, Index, IndexRow, read_index
from d2i.shards.manifest import Manifest, read_manifest
from d2i.shards.sample import (
    IMAGE_SUFFIXES,
    MEMBERS,
    NPY_DTYPES,
    NPY_HEADER_SIZE_BYTES,
    check_json,
    npy_array,
    npy_header,
    npy_size_bytes,
)
from d2i.shards.tar import BLOCK_SIZE_BYTES
from d2i.shards.tar import header as tar_header


@dataclass(frozen=True)
class _OpenShard:
    """A mapped shard: the tar's bytes, its index, and where each array's numbers begin."""

    tar: NDArray[np.uint8]
    index: Index
    starts: Mapping[str, NDArray[np.uint64]]

    def member(self, extent: Extent) -> bytes:
        end = extent.offset + extent.size_bytes
        return self.tar[extent.offset : end].tobytes()


class ShardReader:
    """Random access to the samples of one data set.

    Sample `i` is the i-th in shard order, the same on every machine. Safe to share between
    threads. Holds no open file.
    """

    def __init__(
        self,
        url: str,
        expect_fingerprint: Mapping[str, Any] | None = None,
        *,
        cache_dir: str | Path | None = None,
    ) -> None:
        """Read the manifest; shards are opened when they are needed.

        Args:
            url: The data set's folder.
            expect_fingerprint: Refuse a data set made under any other.
            cache_dir: Local folder that keeps shards fetched from a URL that is not local; by
                default one in the user's cache.

        Raises:
            ShardError: If the manifest is absent or damaged, or the fingerprint is another.
        """
        self.url = storage.resolve(url)
        self._folder = storage.local_path(self.url)
        self._cache_dir = Path(cache_dir) if cache_dir else storage.cache_folder(self.url)
        self.manifest: Manifest = read_manifest(self.url)
        if expect_fingerprint is not None:
            _check_fingerprint(self.url, self.manifest, expect_fingerprint)
        counts = [shard.num_samples for shard in self.manifest.shards]
        self._starts = [0, *accumulate(counts)][:-1]
        self._open: dict[int, _OpenShard] = {}
        self._lock = threading.Lock()
        self.keys: Sequence[str] = _Keys(self)

    def __len__(self) -> int:
        """Give the number of samples."""
        return self.manifest.num_samples

    def read(
        self, indices: ArrayLike, members: Iterable[str] | None = None
    ) -> dict[str, NDArray[Any]]:
        """Read a batch of arrays, in the order of the indices.

        Args:
            indices: N sample numbers, 0 to len - 1, in any order; they may repeat.
            members: Out of "moments", "clip", "tokens", "text"; by default all that are stored.

        Returns:
            New C-contiguous arrays (N, *shape) by member, with the manifest's dtype and shape:
            moments float16 (N, 8, h, w), clip float16 (N, clip_dim), tokens uint16 (N, 77 W),
            text float16 (N, 77 W, text_dim).

        Raises:
            IndexError: If an index is out of range.
            ShardError: If a member is not stored, or a shard is not what the manifest says.
        """
        positions = self._positions(indices)
        arrays = self._select(members)
        batch = {
            name: np.empty((len(positions), *array.shape), NPY_DTYPES[array.dtype])
            for name, array in arrays.items()
        }
        rows = {
            name: values.view(np.uint8).reshape(len(positions), _num_bytes(arrays[name]))
            for name, values in batch.items()
        }
        # In storage order, so that neighbours on disk are read together.
        for target in np.argsort(positions, kind="stable").tolist():
            shard, row = self._locate(int(positions[target]))
            for name, row_bytes in rows.items():
                start = int(shard.starts[name][row])
                row_bytes[target] = shard.tar[start : start + row_bytes.shape[1]]
        return batch

    def read_json(self, index: int) -> dict[str, Any]:
        """Read one sample's `json` member: its context and where its picture came from.

        Raises:
            IndexError: If the index is out of range.
            ShardError: If the bytes do not match their checksum or are not a JSON object.
        """
        return check_json(self._read_member(index, ("json",)) or b"")

    def read_image(self, index: int) -> bytes | None:
        """Read one sample's picture as its source bytes, or None where it was not kept.

        Raises:
            IndexError: If the index is out of range.
            ShardError: If the bytes do not match their checksum.
        """
        return self._read_member(index, IMAGE_SUFFIXES)

    def read_members(self, index: int) -> dict[str, bytes]:
        """Read one sample's members as they lie in the tar, by suffix.

        Raises:
            IndexError: If the index is out of range.
            ShardError: If the bytes of one do not match their checksum.
        """
        shard, row = self._locate(int(self._positions([index])[0]))
        found = shard.index.row(row)
        return {suffix: self._checked(shard, found, suffix) for suffix in found.extents}

    @cached_property
    def empty_tokens(self) -> NDArray[np.uint16]:
        """Token ids of the empty text, uint16 (77 W,), read-only.

        Raises:
            ShardError: If they are not stored or damaged.
        """
        return self._read_empty("empty_tokens.npy")

    @cached_property
    def empty_text(self) -> NDArray[np.float16]:
        """Text latents of the empty text, float16 (77 W, text_dim), read-only.

        Raises:
            ShardError: If they are not stored or damaged.
        """
        return self._read_empty("empty_text.npy")

    def _positions(self, indices: ArrayLike) -> NDArray[np.int64]:
        positions = np.asarray(indices)
        if positions.size == 0:
            return np.empty(0, np.int64)
        if positions.ndim != 1 or positions.dtype.kind not in "iu":
            raise IndexError(
                f"indices are {positions.dtype} {positions.shape}; expected N integers"
            )
        if positions.min() < 0 or positions.max() >= len(self):
            raise IndexError(
                f"indices {positions.min()} to {positions.max()}; expected 0 to {len(self) - 1}"
            )
        return positions.astype(np.int64)

    def _select(self, members: Iterable[str] | None) -> dict[str, ArrayInfo]:
        stored: Mapping[str, ArrayInfo] = self.manifest.arrays  # type: ignore[assignment]
        names = list(stored if members is None else members)
        absent = [name for name in names if name not in stored]
        if absent:
            raise ShardError(
                f"{self.url} stores no {absent[0]!r}, only {', '.join(stored) or 'no array'}; "
                "make the data again with it"
            )
        return {name: stored[name] for name in names}

    def _locate(self, position: int) -> tuple[_OpenShard, int]:
        number = bisect_right(self._starts, position) - 1
        return self._shard(number), position - self._starts[number]

    def _shard(self, number: int) -> _OpenShard:
        shard = self._open.get(number)
        if shard is None:
            with self._lock:
                shard = self._open.get(number) or self._map(self.manifest.shards[number])
                self._open[number] = shard
        return shard

    def _map(self, commit: Commit) -> _OpenShard:
        try:
            index_path = self._local_file(commit.index_name, commit.index_file)
            tar_path = self._local_file(commit.tar_name, commit.tar)
            return _open_shard(commit, _map_file(tar_path), _map_file(index_path))
        except FileNotFoundError as err:
            raise ShardError(
                f"{self.url} lacks a file of shard {commit.name}; expected its tar and its index; "
                "run `d2i repair`"
            ) from err
        except ShardError as err:
            raise ShardError(f"shard {commit.name} of {self.url}: {err}; run `d2i verify`") from err

    def _local_file(self, name: str, info: FileInfo) -> Path:
        """Give the local path of a shard's file, fetching and checking it if it is elsewhere."""
        if self._folder is not None:
            return self._folder / name
        path = self._cache_dir / name
        if not path.is_file() or path.stat().st_size != info.size_bytes:
            storage.fetch_file(storage.join(self.url, name), path)
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != info.sha256:
                    path.unlink(missing_ok=True)
                    raise ShardError(f"{name} was fetched with another sha256 than the manifest's")
        return path

    def _read_member(self, index: int, suffixes: Sequence[str]) -> bytes | None:
        shard, row = self._locate(int(self._positions([index])[0]))
        found = shard.index.row(row)
        suffix = next((suffix for suffix in suffixes if suffix in found.extents), None)
        return self._checked(shard, found, suffix) if suffix else None

    def _checked(self, shard: _OpenShard, row: IndexRow, suffix: str) -> bytes:
        data = shard.member(row.extents[suffix])
        if zlib.crc32(data) != row.extents[suffix].crc32:
            raise ShardError(
                f"{row.key}.{suffix} in {self.url} does not match its checksum; run `d2i repair`"
            )
        return data

    def _read_empty(self, name: Any) -> NDArray[Any]:
        info = self.manifest.files.get(name)
        if info is None:
            raise ShardError(f"{self.url} holds no {name}; make the data again with text latents")
        data = storage.read_bytes(storage.join(self.url, name))
        if hashlib.sha256(data).hexdigest() != info.sha256:
            raise ShardError(f"{name} in {self.url} does not match the manifest; run `d2i repair`")
        return npy_array(data)


class _Keys(Sequence[str]):
    """The keys of a data set, decoded one at a time from the mapped indexes."""

    def __init__(self, reader: ShardReader) -> None:
        self._reader = reader

    def __len__(self) -> int:
        return len(self._reader)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[position] for position in range(len(self))[index]]
        shard, row = self._reader._locate(range(len(self))[index])
        return str(shard.index.keys[row])

    def __iter__(self) -> Iterator[str]:
        for number in range(len(self._reader.manifest.shards)):
            yield from self._reader._shard(number).index.keys.to_pylist()


def _check_fingerprint(url: str, manifest: Manifest, expected: Mapping[str, Any]) -> None:
    if canonical_json(manifest.fingerprint) == canonical_json(expected):
        return
    named = differences(manifest.fingerprint, expected)
    raise ShardError(
        f"{url} was made under another fingerprint ({'; '.join(named)}); "
        "make the data again, or use the recipe it was made with"
    )


def _map_file(path: Path) -> Any:
    """Map a file without keeping it open: the map lives as long as the buffer.

    Python's own mmap holds a descriptor each, which runs out at a thousand shards.
    """
    with pa.memory_map(str(path)) as file:
        return file.read_buffer()


def _open_shard(commit: Commit, tar: Any, index_file: Any) -> _OpenShard:
    """Check a mapped shard against its commit record, before any offset is used.

    Raises:
        ShardError: If a size, the index's sha256, an extent, the first npy header, or the names
            at either end of the tar differ: it may be another shard's.
    """
    if tar.size != commit.tar.size_bytes:
        raise ShardError(f"the tar has {tar.size} bytes; expected {commit.tar.size_bytes}")
    if hashlib.sha256(index_file).hexdigest() != commit.index_file.sha256:
        raise ShardError("the index does not have the sha256 of the manifest")
    index = read_index(index_file, num_samples=commit.num_samples, tar_size_bytes=tar.size)
    tar_bytes = np.frombuffer(tar, np.uint8)
    _check_names(index, tar_bytes)
    starts: dict[str, NDArray[np.uint64]] = {
        name: _array_starts(name, array, index, tar_bytes) for name, array in commit.arrays.items()
    }
    return _OpenShard(tar_bytes, index, starts)


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


def _num_bytes(array: ArrayInfo) -> int:
    return npy_size_bytes(array.shape) - NPY_HEADER_SIZE_BYTES
