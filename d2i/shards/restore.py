"""Restore a data set from its intact parts, without fetching or encoding anything.

The manifest, or else the commit records, describe every shard. An intact tar is enough to rebuild
its index and its commit record; a damaged tar whose samples are all intact is rewritten from them.
Samples can be copied byte for byte into another shard. Whatever cannot be restored must be prepared
again. Must not import torch or ray.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby
from typing import IO, Any

from d2i.errors import ShardError
from d2i.io import storage
from d2i.shards import tar
from d2i.shards.commit import (
    COMMIT_SUFFIX,
    Arrays,
    Commit,
    FileInfo,
    fingerprint_sha256,
    parse_record,
    shard_name,
)
from d2i.shards.index import Extent, Index, IndexRow, index_bytes, read_index
from d2i.shards.layout import ArrayInfo, Layout, layout_of_fingerprint
from d2i.shards.manifest import Manifest, read_manifest
from d2i.shards.sample import Sample
from d2i.shards.writer import file_info, recorded_arrays, streamed_info, write_shard


def copied_samples(url: str, commit: Commit) -> Iterator[Sample]:
    """Yield the samples of one shard in order, one in memory at a time.

    Args:
        url: The data set's directory.
        commit: The shard's record, whose file may be gone; the tar and the index must be there.

    Raises:
        ShardError: If a member does not match its checksum, or the index is not the shard's.
    """
    index = trusted_index(url, commit)
    with storage.open_url(storage.join(url, commit.tar_name)) as tar:
        for row in index.rows():
            sample, broken = _sample(tar, row)
            if broken:
                raise ShardError(
                    f"{row.key}.{broken[0]} in {url} does not match its checksum; run `d2i verify`"
                )
            yield sample


def intact_samples(url: str, commit: Commit) -> Iterator[Sample]:
    """Yield the intact samples of a damaged shard; none if its index cannot be trusted."""
    try:
        index = trusted_index(url, commit)
        with storage.open_url(storage.join(url, commit.tar_name)) as tar:
            for row in index.rows():
                sample, broken = _sample(tar, row)
                if not broken:
                    yield sample
    except (OSError, ShardError):
        return


def trusted_index(url: str, commit: Commit) -> Index:
    """Read the index of a shard, and check it against the commit record.

    Raises:
        ShardError: If it is not the one in the commit record.
        OSError: If it cannot be read.
    """
    data = storage.read_bytes(storage.join(url, commit.index_name))
    if file_info(data) != commit.index_file:
        raise ShardError(f"{commit.index_name} in {url} is damaged; run `d2i verify`")
    return read_index(
        data,
        commit.layout,
        num_samples=commit.num_samples,
        tar_size_bytes=commit.tar.size_bytes,
    )


def _sample(tar: IO[bytes], row: IndexRow) -> tuple[Sample, list[str]]:
    """Return one sample, and the suffixes of its members that do not match their checksum."""
    members = {suffix: _member(tar, extent) for suffix, extent in row.extents.items()}
    broken = [s for s, data in members.items() if zlib.crc32(data) != row.extents[s].crc32]
    return Sample(row.key, members), broken


def _member(tar: IO[bytes], extent: Extent) -> bytes:
    tar.seek(extent.offset)
    return tar.read(extent.size_bytes)


def rebuild_index(url: str, commit: Commit) -> None:
    """Rebuild the index of a shard from its tar.

    Raises:
        ShardError: If the tar cannot be read to its end, or the rebuilt index differs from the
            commit record: another version of Arrow may write other bytes.
        FileNotFoundError: If there is no tar.
    """
    data = _read_tar(url, commit.tar_name, commit.layout).index
    if file_info(data) != commit.index_file:
        raise ShardError(
            f"the rebuilt {commit.index_name} differs from the original; expected the same bytes; "
            "run `d2i repair` with the version of pyarrow that wrote it"
        )
    storage.write_bytes(storage.join(url, commit.index_name), data)


def rebuild_commit(
    url: str,
    tar_name: str,
    *,
    failures: Mapping[str, int],
    fingerprint: Mapping[str, Any],
) -> Commit:
    """Rebuild the index and the commit record of a shard from its tar.

    Args:
        url: The data set's directory.
        tar_name: The tar, under its final name.
        failures: Instances of the shard without a sample, by reason class.
        fingerprint: Of the data set.

    Raises:
        ShardError: If the tar's content does not match its name.
        FileNotFoundError: If there is no tar.
    """
    index = int(tar_name[:6])
    with storage.open_url(storage.join(url, tar_name)) as file:
        info = streamed_info(file)
    if f"{shard_name(index, info.sha256)}.tar" != tar_name:
        raise ShardError(f"the content of {tar_name} does not match the hash in its name")
    layout = layout_of_fingerprint(fingerprint)
    found = _read_tar(url, tar_name, layout)
    commit = Commit(
        format=layout.format,
        name=shard_name(index, info.sha256),
        index=index,
        num_samples=found.num_samples,
        failures=dict(failures),
        fingerprint_sha256=fingerprint_sha256(fingerprint),
        tar=info,
        index_file=file_info(found.index),
        arrays=found.arrays,
    )
    storage.write_bytes(storage.join(url, commit.index_name), found.index)
    storage.write_bytes(storage.join(url, commit.commit_name), commit.to_bytes())
    return commit


@dataclass(frozen=True)
class _FoundInTar:
    index: bytes
    num_samples: int
    arrays: Arrays


def _read_tar(url: str, name: str, layout: Layout) -> _FoundInTar:
    rows: list[IndexRow] = []
    arrays: dict[str, ArrayInfo] = {}
    with storage.open_url(storage.join(url, name)) as file:
        for key, members in groupby(_members(file), key=lambda member: member.key):
            found = list(members)
            extents = {m.suffix: Extent(m.offset, len(m.data), zlib.crc32(m.data)) for m in found}
            rows.append(IndexRow(key, extents))
            arrays = layout.arrays_of(Sample(key, {m.suffix: m.data for m in found}))
    recorded = dict(recorded_arrays(layout, arrays))
    return _FoundInTar(index_bytes(rows, layout), len(rows), recorded)


@dataclass(frozen=True)
class _Member:
    key: str
    suffix: str
    offset: int
    data: bytes


def _members(file: IO[bytes]) -> Iterator[_Member]:
    """Yield the members of a tar, header by header.

    Raises:
        ShardError: At the first byte that `write_shard` would not have written.
    """
    position = 0
    while (block := file.read(tar.BLOCK_SIZE_BYTES)) != tar.END[: tar.BLOCK_SIZE_BYTES]:
        name, size_bytes = tar.read_header(block)
        key, _, suffix = name.partition(".")
        padded = file.read(tar.padded_size_bytes(size_bytes))
        yield _Member(key, suffix, position + tar.BLOCK_SIZE_BYTES, padded[:size_bytes])
        position += tar.BLOCK_SIZE_BYTES + len(padded)


@dataclass(frozen=True)
class RecoveryInputs:
    """The surviving records of the shards that a data set should have.

    Attributes:
        manifest: The manifest; None unless it and its checksum are intact.
        commits: The commit record of each shard by its number: from the manifest, else its own.
    """

    manifest: Manifest | None
    commits: dict[int, Commit]


def find_recovery_inputs(url: str) -> RecoveryInputs:
    """Read the manifest and the commit records, as far as they are intact."""
    commits: dict[int, Commit] = {}
    for name in storage.list_names(url):
        if name.endswith(COMMIT_SUFFIX):
            commit = _read_record(url, name)
            if commit is not None:
                commits.setdefault(commit.index, commit)
    try:
        manifest = read_manifest(url)
    except (OSError, ShardError):
        return RecoveryInputs(None, commits)
    return RecoveryInputs(manifest, commits | {shard.index: shard for shard in manifest.shards})


@dataclass(frozen=True)
class RestoreResult:
    """The restored files, and the shards that could not be restored.

    Attributes:
        files: Names of the files that were written again.
        broken: The shards whose tar must be prepared again.
    """

    files: tuple[str, ...]
    broken: tuple[Commit, ...]


def restore(
    url: str,
    commits: Iterable[Commit],
    fingerprint: Mapping[str, Any] | None,
    *,
    num_threads: int = 4,
) -> RestoreResult:
    """Restore every record and index, and every tar whose samples are intact.

    Args:
        url: The data set's directory; nothing else may write there.
        commits: The commit records of its shards.
        fingerprint: The fingerprint that the shards were made under, if known.
        num_threads: Shards restored at once.

    Raises:
        ShardError: If an index cannot be restored to its original bytes.
    """
    known = list(commits)
    with ThreadPoolExecutor(num_threads) as pool:
        tars = _tars(url, pool)
        restored = _republish(url, known, tars)
        whole = {c.name for c in known if tars.get(c.tar_name) == c.tar or c.tar_name in restored}
        restorer = _Restorer(url, fingerprint)
        results = list(
            pool.map(lambda c: restorer.restore_shard(c, is_whole=c.name in whole), known)
        )
    files = [*restored, *(name for names, _ in results for name in names)]
    broken = [commit for commit, (_, is_whole) in zip(known, results, strict=True) if not is_whole]
    return RestoreResult(tuple(sorted(files)), tuple(broken))


def broken_keys(url: str, commit: Commit) -> frozenset[str] | None:
    """Return the keys of the samples that a damaged shard lost; None if its index is lost too."""
    try:
        keys = trusted_index(url, commit).keys.to_pylist()
    except (OSError, ShardError):
        return None
    return frozenset(keys) - {sample.key for sample in intact_samples(url, commit)}


@dataclass(frozen=True)
class _Restorer:
    url: str
    fingerprint: Mapping[str, Any] | None

    def restore_shard(self, commit: Commit, *, is_whole: bool) -> tuple[list[str], bool]:
        """Restore a shard's files; return their names, and whether the tar is intact now."""
        restored = []
        if not _holds(self.url, commit.commit_name, commit.to_bytes()):
            storage.write_bytes(storage.join(self.url, commit.commit_name), commit.to_bytes())
            restored.append(commit.commit_name)
        if not is_whole:
            if not self._rewrite_tar(commit):
                return restored, False
            restored.append(commit.tar_name)
        if _info(self.url, commit.index_name) != commit.index_file:
            rebuild_index(self.url, commit)
            restored.append(commit.index_name)
        return restored, True

    def _rewrite_tar(self, commit: Commit) -> bool:
        """Rewrite the tar if all of its samples are intact; return whether they are."""
        try:
            write_shard(
                intact_samples(self.url, commit),
                self.url,
                commit.index,
                failures=commit.failures,
                fingerprint=self.fingerprint if commit.fingerprint_sha256 else None,
                expected=commit,
            )
        except ShardError:
            return False
        return True


def _tars(url: str, pool: ThreadPoolExecutor) -> dict[str, FileInfo]:
    """Return size and sha256 of every readable tar, by name."""
    names = [name for name in storage.list_names(url) if name.endswith(".tar")]
    infos = zip(names, pool.map(lambda name: _info(url, name), names), strict=True)
    return {name: info for name, info in infos if info is not None}


def _republish(url: str, commits: list[Commit], tars: Mapping[str, FileInfo]) -> list[str]:
    """Restore tars that lie under another tar's name; return the restored names."""
    places = {info: name for name, info in tars.items()}
    lost = [c for c in commits if tars.get(c.tar_name) != c.tar and c.tar in places]
    with ExitStack() as stack:
        # All are copied before any is published: two may have each other's name.
        copies = [(stack.enter_context(storage.scratch_file(url)), c) for c in lost]
        for path, commit in copies:
            storage.fetch_file(storage.join(url, places[commit.tar]), path)
        for path, commit in copies:
            storage.publish_atomically(path, storage.join(url, commit.tar_name))
    return [commit.tar_name for commit in lost]


def _read_record(url: str, name: str) -> Commit | None:
    place = storage.join(url, name)
    try:
        commit = parse_record(Commit, storage.read_bytes(place), place)
    except (OSError, ShardError):
        return None
    return commit if commit.commit_name == name else None


def _holds(url: str, name: str, expected: bytes) -> bool:
    try:
        return storage.read_bytes(storage.join(url, name)) == expected
    except OSError:
        return False


def _info(url: str, name: str) -> FileInfo | None:
    try:
        with storage.open_url(storage.join(url, name)) as file:
            return streamed_info(file)
    except OSError:
        return None
