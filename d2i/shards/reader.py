"""Random access to the samples of a data set, straight from mapped tars.

A shard is mapped and checked on first use, a sample's headers and checksums when it is first read;
after that a batch costs one copy per member. Parses no header and unpickles nothing. Must not
import torch or ray.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property, partial
from itertools import accumulate
from pathlib import Path
from typing import Any, cast, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from d2i.errors import ShardError
from d2i.io import storage
from d2i.io.config_lock import diff
from d2i.shards.cache.mmap_shards import (
    ForkSafeShards,
    LocalShards,
    MappedShard,
    Shards,
    wrap_errors,
)
from d2i.shards.cache.shard_cache import CachedShards
from d2i.shards.commit import canonical_json
from d2i.shards.dataset import is_indexed
from d2i.shards.index import IndexRow
from d2i.shards.layout import ArrayInfo
from d2i.shards.manifest import Manifest, read_manifest
from d2i.shards.sample import (
    IMAGE_SUFFIXES,
    array_size_bytes,
    check_json,
    npy_array,
    stored_dtype,
)
from d2i.shards.tar_set import TarSet, read_tar_set

# In tars that d2i did not write, a JPEG may be called `jpeg`, too.
_IMAGE_SUFFIXES = (*IMAGE_SUFFIXES, "jpeg")


class ShardReader:
    """Random access to the samples of one data set, or of tars that `d2i index` has listed.

    Sample `i` is the i-th in shard order, the same on every machine. Safe to share between
    threads, to inherit across a fork and to pickle, for workers of any kind. A pickle holds the
    manifest, so that it reads the data set it was made from. Keeps no file open, or one if the
    shards are remote.
    """

    def __init__(
        self,
        url: str,
        expect_fingerprint: Mapping[str, Any] | None = None,
        *,
        cache_dir: str | Path | None = None,
        cache_gb: float | None = None,
        check_data: bool = True,
    ) -> None:
        """Read the manifest; shards are opened when they are needed.

        Args:
            url: The data set's directory.
            expect_fingerprint: Refuse a data set made under any other fingerprint.
            cache_dir: Local directory for the shards of a remote data set; by default one in the
                user's cache. Processes and data sets may share it.
            cache_gb: Upper bound on the cache, in 1e9 bytes; whole shards are evicted, least
                recently used first. By default everything fetched is kept.
            check_data: Compare each array with its checksum when this process first reads it; can
                be turned off where `verify` has just read everything.

        Raises:
            ConfigError: If the largest shard does not fit into the cache.
            ShardError: If the manifest is missing or damaged, or the fingerprint differs.
        """
        self.url = storage.resolve(url)
        self._content = _read_content(self.url)
        if expect_fingerprint is not None:
            _check_fingerprint(self.url, self.manifest, expect_fingerprint)
        counts = [shard.num_samples for shard in self._content.shards]
        self._starts = [0, *accumulate(counts)][:-1]
        # For batches, which would convert the list each time; single samples use the list.
        self._start_array = np.array(self._starts, np.int64)
        self._shards = self._find_shards(cache_dir, cache_gb, check_data=check_data)
        self.keys: Sequence[str] = _Keys(self._shards, self._starts, len(self))

    def __len__(self) -> int:
        """Return the number of samples."""
        return self._content.num_samples

    @property
    def manifest(self) -> Manifest:
        """The manifest of data that d2i prepared.

        Raises:
            ShardError: If d2i did not prepare it, but has listed its tars alone.
        """
        if isinstance(self._content, TarSet):
            raise ShardError(
                f"{self.url} holds tars that d2i did not prepare; expected data made by d2i "
                "preprocess; `d2i index` gives such tars to ShardReader and `d2i verify` alone"
            )
        return self._content

    @property
    def arrays(self) -> Mapping[str, ArrayInfo]:
        """Dtype and shape of each array that `read` returns, without the axis of samples."""
        return self._content.arrays

    def read(
        self, indices: ArrayLike, members: Iterable[str] | None = None
    ) -> dict[str, NDArray[Any]]:
        """Read a batch of arrays, in the order of the indices.

        Args:
            indices: N sample numbers, 0 to len - 1, in any order; they may repeat.
            members: Out of `arrays`; by default all that are stored.

        Returns:
            New C-contiguous arrays (N, *shape) by member, with the dtype and shape of `arrays`; the
            bits of bfloat16 come as uint16. A tensor wraps them without a copy, and pins them with
            one. In format 1: moments float16 (N, 8, h, w), clip float16 (N, clip_dim), tokens
            uint16 (N, 77 W), text float16 (N, 77 W, text_dim). Of tars that d2i did not write: each
            `KEY.NAME.npy` as NAME, and `KEY.npy` as npy, that all samples have in one dtype and
            shape; `read_members` has the bytes of all members.

        Raises:
            IndexError: If an index is out of range.
            ShardError: If a member is not stored, or a shard does not match the manifest.
        """
        positions = self._positions(indices)
        arrays = self._select(members)
        batch = {
            name: np.empty((len(positions), *array.shape), stored_dtype(array.dtype))
            for name, array in arrays.items()
        }
        rows = {
            name: values.reshape(-1)
            .view(np.uint8)
            .reshape(len(positions), _num_bytes(arrays[name]))
            for name, values in batch.items()
        }
        for number, places in self._by_shard(positions):
            with self._shards.using(number) as shard, self._wrap_errors(number):
                _copy_rows(shard, positions[places] - self._starts[number], places, rows)
        return batch

    def prefetch(self, shards: Iterable[int]) -> None:
        """Fetch remote shards ahead of their use, in the background.

        Replaces the previous call: give all shards that will be read next, first one first, by
        number in the manifest. A bounded cache keeps those longest that are needed soonest.
        """
        self._shards.prefetch(list(shards))

    def read_json(self, index: int) -> dict[str, Any]:
        """Read one sample's `json` member: its context and the source of its image.

        Raises:
            IndexError: If the index is out of range.
            ShardError: If the bytes do not match their checksum or are not a JSON object.
        """
        data = self._read_member(index, ("json",))
        if not isinstance(self._content, TarSet):
            return check_json(data or b"")
        value = _json_object(data or b"")
        if value is None:
            found = "no json member" if data is None else "a json member that is no JSON object"
            raise ShardError(
                f"sample {self.keys[index]!r} of {self._tar_url(index)} has {found}; expected an "
                "object; read_members has the bytes of its members"
            )
        return value

    def read_image(self, index: int) -> bytes | None:
        """Read one sample's image as its source bytes, or None if they were not kept.

        Raises:
            IndexError: If the index is out of range.
            ShardError: If the bytes do not match their checksum.
        """
        return self._read_member(index, _IMAGE_SUFFIXES)

    def read_members(self, index: int) -> dict[str, bytes]:
        """Read one sample's members as stored in the tar, by suffix.

        Raises:
            IndexError: If the index is out of range.
            ShardError: If a member does not match its checksum.
        """
        number, row = _locate(self._starts, int(self._positions([index])[0]))
        with self._shards.using(number) as shard, self._wrap_errors(number):
            found = shard.index.row(row)
            return {suffix: _checked(shard, found, suffix) for suffix in found.extents}

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

    def _find_shards(
        self, cache_dir: str | Path | None, cache_gb: float | None, *, check_data: bool
    ) -> Shards:
        directory, commits = storage.local_path(self.url), self._content.shards
        if directory is not None:
            return LocalShards(directory, commits, check_data=check_data)
        cache = Path(cache_dir) if cache_dir else storage.cache_directory("shards")
        opened = partial(CachedShards, self.url, commits, cache, cache_gb, check_data=check_data)
        return ForkSafeShards(opened)

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
        stored = self.arrays
        names = list(stored if members is None else members)
        absent = [name for name in names if name not in stored]
        if absent:
            others = isinstance(self._content, TarSet)
            next_step = (
                "not in every sample, or of several shapes? read_members has the bytes"
                if others
                else "prepare the data again with it"
            )
            raise ShardError(
                f"{self.url} stores no {absent[0]!r}, only {', '.join(stored) or 'no array'}; "
                f"{next_step}"
            )
        return {name: stored[name] for name in names}

    def _by_shard(self, positions: NDArray[np.int64]) -> Iterator[tuple[int, NDArray[np.int64]]]:
        """Yield each shard with the positions in the batch that it fills, in storage order."""
        if not len(positions):
            return
        places = np.argsort(positions, kind="stable")
        numbers = np.searchsorted(self._start_array, positions[places], side="right") - 1
        for part in np.split(places, np.flatnonzero(np.diff(numbers)) + 1):
            yield _locate(self._starts, int(positions[part[0]]))[0], part

    def _read_member(self, index: int, suffixes: Sequence[str]) -> bytes | None:
        number, row = _locate(self._starts, int(self._positions([index])[0]))
        with self._shards.using(number) as shard, self._wrap_errors(number):
            found = shard.index.row(row)
            suffix = next((suffix for suffix in suffixes if suffix in found.extents), None)
            return _checked(shard, found, suffix) if suffix else None

    def _tar_url(self, index: int) -> str:
        number, _ = _locate(self._starts, index)
        return storage.join(self.url, self._content.shards[number].tar_name)

    def _wrap_errors(self, number: int) -> AbstractContextManager[None]:
        return wrap_errors(self.url, self._content.shards[number])

    def _read_empty(self, name: Any) -> NDArray[Any]:
        info = self.manifest.files.get(name)
        if info is None:
            again = "prepare the data again with text latents"
            reason = again if self.manifest.format == 1 else "format 2 stores no such features"
            raise ShardError(f"{self.url} holds no {name}; {reason}")
        data = storage.read_bytes(storage.join(self.url, name))
        if hashlib.sha256(data).hexdigest() != info.sha256:
            raise ShardError(f"{name} in {self.url} does not match the manifest; run `d2i repair`")
        return npy_array(data)


class _Keys(Sequence[str]):
    """The keys of a data set, decoded one at a time from the mapped indexes."""

    def __init__(self, shards: Shards, starts: Sequence[int], num_samples: int) -> None:
        self._shards, self._starts, self._num_samples = shards, starts, num_samples

    def __len__(self) -> int:
        return self._num_samples

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[position] for position in range(len(self))[index]]
        number, row = _locate(self._starts, range(len(self))[index])
        return str(self._shards.index(number).keys[row])

    def __iter__(self) -> Iterator[str]:
        for number in range(len(self._starts)):
            yield from self._shards.index(number).keys.to_pylist()


def _read_content(url: str) -> Manifest | TarSet:
    try:
        return read_manifest(url)
    except ShardError:
        if is_indexed(url):
            return read_tar_set(url)
        raise


def _json_object(data: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return cast("dict[str, Any]", value) if isinstance(value, dict) else None


def _locate(starts: Sequence[int], position: int) -> tuple[int, int]:
    """Return the number of a sample's shard, and its row there."""
    number = bisect_right(starts, position) - 1
    return number, position - starts[number]


def _check_fingerprint(url: str, manifest: Manifest, expected: Mapping[str, Any]) -> None:
    if canonical_json(manifest.fingerprint) == canonical_json(expected):
        return
    named = diff(manifest.fingerprint, expected)
    raise ShardError(
        f"{url} was made under another fingerprint ({'; '.join(named)}); "
        "prepare the data again, or use the recipe that it was prepared with"
    )


def _checked(shard: MappedShard, row: IndexRow, suffix: str) -> bytes:
    data = shard.member(row, suffix)
    if zlib.crc32(data) != row.extents[suffix].crc32:
        raise ShardError(f"{row.key}.{suffix} does not match its checksum")
    return data


def _copy_rows(
    shard: MappedShard,
    rows: NDArray[np.int64],
    places: NDArray[np.int64],
    batch: Mapping[str, NDArray[np.uint8]],
) -> None:
    """Copy rows of a shard to their positions, sample by sample: members are adjacent."""
    arrays = list(batch.values())
    starts = [shard.arrays[name].starts(rows) for name in batch]
    for place, *begins in zip(places.tolist(), *starts, strict=True):
        for array, begin in zip(arrays, begins, strict=True):
            array[place] = shard.tar[begin : begin + array.shape[1]]


def _num_bytes(array: ArrayInfo) -> int:
    return array_size_bytes(array.dtype, array.shape)
