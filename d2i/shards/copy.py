"""Take the samples out of a shard, byte for byte, to write them into another."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import IO

from d2i import storage
from d2i.errors import ShardError
from d2i.shards.commit import Commit
from d2i.shards.index import Extent, Index, IndexRow, read_index
from d2i.shards.sample import Sample
from d2i.shards.write import file_info


def copied_samples(url: str, commit: Commit) -> Iterator[Sample]:
    """Yield the samples of one shard in their order, one in memory at a time.

    Args:
        url: The data set's folder.
        commit: The shard's record, which may be there no more; its tar and index must be.

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
    """Yield those samples of a damaged shard that are as they were; none where nothing says so."""
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
    """Read the index of a shard.

    Raises:
        ShardError: If it is not the one that the commit record tells of.
        OSError: If it cannot be read.
    """
    data = storage.read_bytes(storage.join(url, commit.index_name))
    if file_info(data) != commit.index_file:
        raise ShardError(f"{commit.index_name} in {url} is damaged; run `d2i verify`")
    return read_index(data, num_samples=commit.num_samples, tar_size_bytes=commit.tar.size_bytes)


def _sample(tar: IO[bytes], row: IndexRow) -> tuple[Sample, list[str]]:
    """Read one sample, and name its members that do not match their checksum."""
    members = {suffix: _member(tar, extent) for suffix, extent in row.extents.items()}
    broken = [s for s, data in members.items() if zlib.crc32(data) != row.extents[s].crc32]
    return Sample(row.key, members), broken


def _member(tar: IO[bytes], extent: Extent) -> bytes:
    tar.seek(extent.offset)
    return tar.read(extent.size_bytes)
