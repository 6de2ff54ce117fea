"""Take the samples out of a committed shard, byte for byte, to write them into another."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import IO

from d2i import storage
from d2i.errors import ShardError
from d2i.shards.commit import Commit
from d2i.shards.index import Extent, read_index
from d2i.shards.sample import Sample


def copied_samples(url: str, commit: Commit) -> Iterator[Sample]:
    """Yield the samples of one shard in their order, one in memory at a time.

    Args:
        url: The data set's folder.
        commit: The shard's record, which may be there no more; its tar and index must be.

    Raises:
        ShardError: If a member does not match its checksum, or the index is not the shard's.
    """
    index = read_index(
        storage.read_bytes(storage.join(url, commit.index_name)),
        num_samples=commit.num_samples,
        tar_size_bytes=commit.tar.size_bytes,
    )
    with storage.open_url(storage.join(url, commit.tar_name)) as tar:
        for row in index.rows():
            members = {suffix: _member(tar, extent) for suffix, extent in row.extents.items()}
            for suffix, data in members.items():
                if zlib.crc32(data) != row.extents[suffix].crc32:
                    raise ShardError(
                        f"{row.key}.{suffix} in {url} does not match its checksum; run `d2i verify`"
                    )
            yield Sample(row.key, members)


def _member(tar: IO[bytes], extent: Extent) -> bytes:
    tar.seek(extent.offset)
    return tar.read(extent.size_bytes)
