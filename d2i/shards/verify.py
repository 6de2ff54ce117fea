"""Check every byte of a data set against its manifest.

The index and the canonical tar form together determine every byte of a tar's frame, so the frame is
compared, not parsed: a link, a device, `..`, a pickle or a trailing byte is simply a frame that
differs. Must not import torch or ray.
"""

from __future__ import annotations

import hashlib
import zlib
from array import array
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from d2i.errors import ShardError
from d2i.io import storage
from d2i.io.prefetch import prefetch_map
from d2i.shards import tar
from d2i.shards.commit import Commit, FileInfo
from d2i.shards.dataset import is_indexed
from d2i.shards.index import Index, IndexRow, read_index
from d2i.shards.layout import FORMAT_1
from d2i.shards.manifest import EMPTY_NAMES, MANIFEST_NAME, Manifest, listed_names, read_manifest
from d2i.shards.metadata import check_sample
from d2i.shards.sample import Sample
from d2i.shards.verify_report import ShardProblem, VerifyReport, compare_info
from d2i.shards.verify_tars import verify_tars

OTHER_DIRECTORIES = frozenset({"plan", "ledger"})
_CHUNK_SIZE_BYTES = 1 << 20


def verify(
    url: str,
    *,
    num_threads: int = 4,
    on_progress: Callable[[int, int], None] | None = None,
) -> VerifyReport:
    """Read every byte of a data set, and report whatever differs from its manifest.

    Tars that `d2i index` has listed are compared with that list.

    Args:
        url: The data set's directory.
        num_threads: Shards checked at once.
        on_progress: Called in this thread with the number of shards done, and their total.

    Returns:
        Shards and samples as the manifest counts them, and the defects, sorted by file name.
    """
    try:
        manifest = read_manifest(url)
    except (ShardError, OSError) as err:
        if isinstance(err, ShardError) and is_indexed(url):
            return verify_tars(url, num_threads=num_threads, on_progress=on_progress)
        return VerifyReport(0, 0, (ShardProblem(MANIFEST_NAME, "manifest", str(err)),))
    problems = [*_unlisted(url, manifest), *_check_files(url, manifest)]
    checks = (_ShardCheck(url, shard) for shard in manifest.shards)
    key_hashes = array("q")
    for done, check in enumerate(prefetch_map(_ShardCheck.run, checks, num_threads), start=1):
        problems += check.problems
        if check.index is not None:
            key_hashes.extend(map(hash, check.index.keys.to_pylist()))
        if on_progress is not None:
            on_progress(done, len(manifest.shards))
    problems += _duplicates(url, manifest, key_hashes)
    problems.sort(key=lambda problem: (problem.file, problem.reason))
    return VerifyReport(len(manifest.shards), manifest.num_samples, tuple(problems))


class _ShardCheck:
    """The check of one shard: the defects so far, and its index once that is known to be valid."""

    def __init__(self, url: str, shard: Commit) -> None:
        self.url = url
        self.shard = shard
        self.index: Index | None = None
        self.problems: list[ShardProblem] = []

    def run(self) -> _ShardCheck:
        """Check the three files of the shard."""
        for name, check in (
            (self.shard.commit_name, self._check_commit),
            (self.shard.index_name, self._check_index),
            (self.shard.tar_name, self._check_tar),
        ):
            try:
                check(name)
            except FileNotFoundError:
                self._add(name, "missing", f"shard {self.shard.name} lacks this file")
            except OSError as err:
                self._add(name, "unreadable", str(err))
        return self

    def read_index(self) -> Index | None:
        """Read the index alone; None if it cannot be read."""
        with suppress(OSError):
            self._check_index(self.shard.index_name)
        return self.index

    def _add(self, file: str, reason: str, detail: str) -> None:
        self.problems.append(ShardProblem(file, reason, detail))

    def _check_commit(self, name: str) -> None:
        if storage.read_bytes(storage.join(self.url, name)) != self.shard.to_bytes():
            self._add(name, "commit", "differs from the manifest's record of this shard")

    def _check_index(self, name: str) -> None:
        data = storage.read_bytes(storage.join(self.url, name))
        self.problems += _compare(name, data, self.shard.index_file)
        try:
            self.index = read_index(
                data,
                self.shard.layout,
                num_samples=self.shard.num_samples,
                tar_size_bytes=self.shard.tar.size_bytes,
            )
        except ShardError as err:
            self._add(name, "index", str(err))

    def _check_tar(self, name: str) -> None:
        with storage.open_url(storage.join(self.url, name)) as file:
            walk = _TarWalk(file, self.shard)
            try:
                for problem in walk.run(self.index) if self.index else ():
                    self._add(name, "member", problem)
            except ShardError as err:
                self._add(name, "structure", str(err))
            walk.drain()
        self.problems += compare_info(name, walk.info(), self.shard.tar)


class _TarWalk:
    """One pass over a tar that hashes every byte and compares it with the index on the way."""

    def __init__(self, file: IO[bytes], shard: Commit) -> None:
        self._file = file
        self._layout, self._arrays = shard.layout, shard.arrays
        self._sha256 = hashlib.sha256()
        self._position = 0

    def run(self, index: Index) -> Iterator[str]:
        """Compare the tar with its index, and yield one line for each defective sample.

        Raises:
            ShardError: If the frame around the members differs; nothing after that is compared.
        """
        for row in index.rows():
            members = {suffix: self._member(row, suffix) for suffix in row.extents}
            wrong = [
                suffix
                for suffix, data in members.items()
                if zlib.crc32(data) != row.extents[suffix].crc32
            ]
            if wrong:
                yield f"{row.key}: {', '.join(wrong)} do not match their checksum"
                continue
            sample = Sample(row.key, members)
            try:
                arrays = self._layout.arrays_of(sample)
                check_sample(sample)
            except ShardError as err:
                yield str(err)
                continue
            if arrays != self._arrays:
                yield f"{row.key}: has arrays {arrays}; the manifest says {self._arrays}"
        self._expect(tar.END, "the end of the tar")
        if self._read(1):
            raise ShardError(f"bytes follow the end of the tar at {self._position - 1}")

    def drain(self) -> None:
        """Hash the rest."""
        while self._read(_CHUNK_SIZE_BYTES):
            pass

    def info(self) -> FileInfo:
        """Return size and sha256 of the bytes read."""
        return FileInfo(size_bytes=self._position, sha256=self._sha256.hexdigest())

    def _member(self, row: IndexRow, suffix: str) -> bytes:
        extent, name = row.extents[suffix], f"{row.key}.{suffix}"
        self._expect(tar.header(name, extent.size_bytes), f"the plain file {name}")
        if self._position != extent.offset:
            raise ShardError(f"{name} is at {self._position}; the index says {extent.offset}")
        data = self._read(extent.size_bytes)
        self._expect(tar.padding(len(data)), f"the padding of {name}")
        return data

    def _expect(self, expected: bytes, what: str) -> None:
        start = self._position
        if self._read(len(expected)) != expected:
            raise ShardError(f"expected {what} at byte {start}, as the index says")

    def _read(self, size_bytes: int) -> bytes:
        data: bytes = self._file.read(size_bytes)
        self._sha256.update(data)
        self._position += len(data)
        return data


def _compare(name: str, data: bytes, expected: FileInfo) -> list[ShardProblem]:
    found = FileInfo(size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    return compare_info(name, found, expected)


def _unlisted(url: str, manifest: Manifest) -> list[ShardProblem]:
    names = set(storage.list_names(url)) - listed_names(manifest) - OTHER_DIRECTORIES
    detail = "not listed in the manifest"
    return [ShardProblem(name, "unlisted", detail) for name in names]


def _check_files(url: str, manifest: Manifest) -> Iterator[ShardProblem]:
    """Check the features of the empty text."""
    for name, expected in manifest.files.items():
        try:
            data = storage.read_bytes(storage.join(url, name))
            yield from _compare(name, data, expected)
            FORMAT_1.check_array(EMPTY_NAMES[name], data)
        except FileNotFoundError:
            yield ShardProblem(name, "missing", "listed in the manifest, but not there")
        except OSError as err:
            yield ShardProblem(name, "unreadable", str(err))
        except ShardError as err:
            yield ShardProblem(name, "member", str(err))


def _duplicates(url: str, manifest: Manifest, key_hashes: array[int]) -> Iterator[ShardProblem]:
    """Find keys that several samples share, within a shard or across shards.

    Reads the keys a second time, and keeps only those whose hash repeats: the keys of all samples
    may not fit in memory.
    """
    hashes = np.frombuffer(key_hashes, np.int64)
    hashes.sort()
    repeated_hashes = set(hashes[1:][hashes[1:] == hashes[:-1]].tolist())
    if not repeated_hashes:
        return
    keys: dict[str, pa.Array] = {}
    for shard in manifest.shards:
        index = _ShardCheck(url, shard).read_index()
        found = index.keys.to_pylist() if index else []
        keys[shard.tar_name] = pa.array(
            [key for key in found if hash(key) in repeated_hashes], pa.string()
        )
    counts = pc.value_counts(pa.chunked_array(list(keys.values()), pa.string()))
    repeated = counts.filter(pc.greater(counts.field("counts"), 1)).field("values")
    if not len(repeated):
        return
    for file, of_shard in keys.items():
        found = of_shard.filter(pc.is_in(of_shard, repeated)).unique()
        if len(found):
            yield ShardProblem(
                file, "duplicate", f"{len(found)} keys occur more than once, first {found[0]}"
            )
