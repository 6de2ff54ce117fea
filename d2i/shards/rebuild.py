"""Make again what lies beside a tar out of the tar alone: its index and its commit record.

Only for a tar that is known to be intact. Must not import torch or ray.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import IO, Any

from d2i import storage
from d2i.errors import ShardError
from d2i.shards import tar
from d2i.shards.commit import ArrayInfo, Commit, shard_name
from d2i.shards.index import Extent, IndexRow, index_bytes
from d2i.shards.sample import Sample, sample_arrays
from d2i.shards.write import file_info, streamed_info


def rebuild_index(url: str, commit: Commit) -> None:
    """Write the index of a shard anew, out of its tar.

    Raises:
        ShardError: If the tar cannot be read to its end, or another index comes of it than the
            commit record tells of: another version of Arrow may write other bytes.
        FileNotFoundError: If there is no tar.
    """
    data = _read_tar(url, commit.tar_name).index
    if file_info(data) != commit.index_file:
        raise ShardError(
            f"{commit.index_name} came out with other bytes than it had; expected the same; "
            "repair with the version of pyarrow that wrote it"
        )
    storage.write_bytes(storage.join(url, commit.index_name), data)


def rebuild_commit(
    url: str,
    tar_name: str,
    *,
    failures: Mapping[str, int],
    fingerprint_sha256: str | None,
) -> Commit:
    """Write index and commit record of a shard anew, out of its tar.

    Args:
        url: The data set's folder.
        tar_name: The tar, under its final name.
        failures: Instances of the shard without a sample, by reason class.
        fingerprint_sha256: Of the data set.

    Raises:
        ShardError: If the tar's content is not the one that its name tells of.
        FileNotFoundError: If there is no tar.
    """
    index = int(tar_name[:6])
    with storage.open_url(storage.join(url, tar_name)) as file:
        info = streamed_info(file)
    if f"{shard_name(index, info.sha256)}.tar" != tar_name:
        raise ShardError(f"{tar_name} does not hold what its name tells of")
    found = _read_tar(url, tar_name)
    commit = Commit(
        name=shard_name(index, info.sha256),
        index=index,
        num_samples=found.num_samples,
        failures=dict(failures),
        fingerprint_sha256=fingerprint_sha256,
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
    arrays: dict[Any, ArrayInfo]


def _read_tar(url: str, name: str) -> _FoundInTar:
    rows, arrays = [], {}
    with storage.open_url(storage.join(url, name)) as file:
        for key, members in groupby(_members(file), key=lambda member: member.key):
            found = list(members)
            extents = {m.suffix: Extent(m.offset, len(m.data), zlib.crc32(m.data)) for m in found}
            rows.append(IndexRow(key, extents))
            arrays = sample_arrays(Sample(key, {m.suffix: m.data for m in found}))
    infos = {name: ArrayInfo(dtype=dtype, shape=shape) for name, (dtype, shape) in arrays.items()}
    return _FoundInTar(index_bytes(rows), len(rows), infos)


@dataclass(frozen=True)
class _Member:
    key: str
    suffix: str
    offset: int
    data: bytes


def _members(file: IO[bytes]) -> Iterator[_Member]:
    """Walk a tar from header to header.

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
