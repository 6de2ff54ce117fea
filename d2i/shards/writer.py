"""Write one shard: tar, then index, then commit record. Must not import torch or ray."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import IO, Any

from d2i.errors import ShardError
from d2i.fault_injection import Point
from d2i.io import storage
from d2i.io.config_lock import diff
from d2i.shards import tar
from d2i.shards.commit import Commit, FileInfo, fingerprint_sha256, shard_name
from d2i.shards.index import Extent, IndexRow, index_bytes
from d2i.shards.layout import ArrayInfo, DeclaredLayout, Layout, layout_of_fingerprint
from d2i.shards.sample import Sample

_CHUNK_SIZE_BYTES = 1 << 20


def write_shard(
    samples: Iterable[Sample],
    out_url: str,
    index: int,
    *,
    failures: Mapping[str, int],
    fingerprint: Mapping[str, Any] | None = None,
    expected: Commit | None = None,
    fault: Callable[[Point], None] | None = None,
) -> Commit:
    """Write samples, in the order given, to one shard of a data set, and commit it.

    The same samples always give the same bytes under the same name, and each file is published
    atomically. The samples are taken one at a time, and none is kept.

    Args:
        samples: The samples; none if every instance failed.
        out_url: The data set's directory.
        index: Number of the shard in the plan, 0 to 999999.
        failures: Instances without a sample, by reason class. A supplement shard, which retries
            instances counted before, subtracts those that succeed with negative counts.
        fingerprint: Everything that determines the bytes, and in format 2 declares the arrays;
            `write_manifest` rejects shards of another one.
        expected: The record of a shard that is written again; any other shard is rejected.
        fault: Called at each fault point: `shard.written` (complete, but under no name yet), then
            `shard.tar`, `shard.index`, `shard.commit` (published).

    Returns:
        The commit record, as written.

    Raises:
        ShardError: If a key repeats, a member is not legal, samples differ in their arrays, or the
            shard is not the expected one; no file is left behind.
    """
    trigger_at = fault or (lambda _point: None)
    layout = layout_of_fingerprint(fingerprint)
    with storage.scratch_file(out_url) as scratch:
        writer = _write_tar(samples, scratch, layout)
        index_data = index_bytes(writer.rows, layout)
        commit = Commit(
            format=layout.format,
            name=shard_name(index, writer.sha256.hexdigest()),
            index=index,
            num_samples=len(writer.rows),
            failures={reason: count for reason, count in sorted(failures.items()) if count},
            fingerprint_sha256=None if fingerprint is None else fingerprint_sha256(fingerprint),
            tar=FileInfo(size_bytes=writer.position, sha256=writer.sha256.hexdigest()),
            index_file=file_info(index_data),
            arrays=dict(recorded_arrays(layout, writer.arrays)),
        )
        if expected is not None and commit != expected:
            raise ShardError(_other_than(expected, commit))
        trigger_at("shard.written")
        storage.publish_atomically(scratch, storage.join(out_url, commit.tar_name))
    trigger_at("shard.tar")
    storage.write_bytes(storage.join(out_url, commit.index_name), index_data)
    trigger_at("shard.index")
    storage.write_bytes(storage.join(out_url, commit.commit_name), commit.to_bytes())
    trigger_at("shard.commit")
    return commit


def recorded_arrays(
    layout: Layout, found: Mapping[str, ArrayInfo] | None
) -> Mapping[str, ArrayInfo]:
    """Return the arrays that the record of a shard names, from those of its samples, if any."""
    return layout.declared if isinstance(layout, DeclaredLayout) else found or {}


def file_info(data: bytes) -> FileInfo:
    """Return size and sha256 of a file's content."""
    return FileInfo(size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def streamed_info(file: IO[bytes]) -> FileInfo:
    """Return size and sha256 of an open file, from its current position."""
    digest, size_bytes = hashlib.sha256(), 0
    while chunk := file.read(_CHUNK_SIZE_BYTES):
        digest.update(chunk)
        size_bytes += len(chunk)
    return FileInfo(size_bytes=size_bytes, sha256=digest.hexdigest())


def _other_than(expected: Commit, made: Commit) -> str:
    """Return the difference between a rewritten shard and its original, in one line."""
    if made.num_samples != expected.num_samples:
        return (
            f"the rewritten shard has {made.num_samples} samples; expected {expected.num_samples}"
        )
    if made.tar != expected.tar:
        return f"the rewritten shard, {made.name}, has other bytes; an image or a version changed"
    named = diff(made.model_dump(mode="json"), expected.model_dump(mode="json"))
    return f"the rewritten shard has another record: {'; '.join(named[:3])}"


def _write_tar(samples: Iterable[Sample], path: Path, layout: Layout) -> _TarWriter:
    with path.open("wb") as file:
        writer = _TarWriter(file, layout)
        for sample in samples:
            writer.add(sample)
        writer.write(tar.END)
    return writer


class _TarWriter:
    """A tar being written: its position, its hash so far, and the index rows of its samples."""

    def __init__(self, file: IO[bytes], layout: Layout) -> None:
        self._file, self._layout = file, layout
        self._keys: set[str] = set()
        self.sha256 = hashlib.sha256()
        self.position = 0
        self.rows: list[IndexRow] = []
        self.arrays: dict[str, ArrayInfo] | None = None

    def add(self, sample: Sample) -> None:
        """Append one sample's members.

        Raises:
            ShardError: If the sample is not legal, or does not match those before it.
        """
        arrays = self._layout.arrays_of(sample)
        if sample.key in self._keys:
            raise ShardError(f"key {sample.key} is in the shard twice; keys must be unique")
        if self.arrays not in (None, arrays):
            raise ShardError(f"sample {sample.key} has {arrays}; those before it {self.arrays}")
        self._keys.add(sample.key)
        self.arrays = arrays
        extents = {
            suffix: self._add(sample.key, suffix, sample.members[suffix])
            for suffix in self._layout.suffixes
            if suffix in sample.members
        }
        self.rows.append(IndexRow(sample.key, extents))

    def _add(self, key: str, suffix: str, data: bytes) -> Extent:
        self.write(tar.header(f"{key}.{suffix}", len(data)))
        extent = Extent(self.position, len(data), zlib.crc32(data))
        self.write(data)
        self.write(tar.padding(len(data)))
        return extent

    def write(self, data: bytes) -> None:
        """Append raw bytes."""
        self._file.write(data)
        self.sha256.update(data)
        self.position += len(data)
