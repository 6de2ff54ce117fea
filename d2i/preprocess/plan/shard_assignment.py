"""Assignment of instances to shards: grouped by image, without holding all in memory.

Rows go to disk and come back in ranges of their image's hash (`hash_partition`), and each range
is sorted alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from d2i.dialog import Instance
from d2i.preprocess.plan.hash_partition import HashPartitions
from d2i.preprocess.plan.record_files import records_table

_HASH, _RANK = "image_hash", "rank"


class ShardAssigner:
    """Takes instances in any order, then returns them as shards, sorted by image, then key.

    Use it in a `with` block, whose end closes the input.

    Args:
        directory: An empty local directory for the intermediate file.
    """

    def __init__(self, directory: Path) -> None:
        self._rows = HashPartitions(directory / "rows.arrow", _HASH)
        self.num_images = 0
        self.most_occurrences = 0

    def __enter__(self) -> Self:
        """Start accepting instances."""
        self._rows.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        """Close the file, so that `shards` can read it."""
        self._rows.__exit__(*error)

    def add(self, instances: Sequence[Instance], ranks: NDArray[np.uint64]) -> None:
        """Add a batch of instances, with the rank of each (N,)."""
        table = records_table(instances)
        table = table.append_column(_HASH, pa.array(_image_hashes(instances), pa.uint64()))
        self._rows.add(table.append_column(_RANK, pa.array(ranks, pa.uint64())))

    def shards(self, max_rank: int, num_samples: int) -> Iterator[pa.Table]:
        """Yield the rows up to a rank, cut into shards of at least `num_samples`, but for the last.

        All instances of an image stay together. `num_images` counts the images so far,
        `most_occurrences` the instances of the most frequent one.
        """
        rest, rest_hashes = None, np.zeros(0, np.uint64)
        for next_table, next_hashes in self._sorted_tables(max_rank):
            occurrences = np.unique(next_hashes, return_counts=True)[1]
            self.num_images += len(occurrences)
            most = int(occurrences.max(initial=0))
            self.most_occurrences = max(self.most_occurrences, most)
            table = next_table if rest is None else pa.concat_tables([rest, next_table])
            hashes = np.concatenate([rest_hashes, next_hashes])
            begin = 0
            for end in _shard_ends(hashes, num_samples):
                yield table.slice(begin, end - begin)
                begin = end
            rest, rest_hashes = table.slice(begin), hashes[begin:]
        if rest is not None and rest.num_rows:
            yield rest

    def _sorted_tables(self, max_rank: int) -> Iterator[tuple[pa.Table, NDArray[np.uint64]]]:
        """Yield records and image hashes of the rows up to a rank, one hash range at a time."""
        for table in self._rows.buckets():
            order = _sorted_rows(table, max_rank)
            hashes = table.column(_HASH).take(order).to_numpy()
            yield table.drop_columns([_HASH, _RANK]).take(order), hashes


def _sorted_rows(table: pa.Table, max_rank: int) -> pa.Array:
    """Return the indices of the rows up to a rank, sorted by image, then key."""
    order = pc.sort_indices(table, [(_HASH, "ascending"), ("key", "ascending")])
    ranks = table.column(_RANK).to_numpy()
    return order.filter(pa.array(ranks[order.to_numpy()] <= np.uint64(max_rank)))


def _shard_ends(hashes: NDArray[np.uint64], num_samples: int) -> Iterator[int]:
    """Yield the end row of each shard that is complete within these rows."""
    image_starts = np.flatnonzero(hashes[1:] != hashes[:-1]) + 1
    begin = 0
    while True:
        at = np.searchsorted(image_starts, begin + num_samples)
        if at == len(image_starts):
            return
        begin = int(image_starts[at])
        yield begin


def _image_hashes(instances: Sequence[Instance]) -> NDArray[np.uint64]:
    """Hash the reference of each image, which spreads images and hosts over all shards."""
    start = hashlib.blake2b(digest_size=8)
    digests = []
    for instance in instances:
        digest = start.copy()  # Takes half the time of a new hasher.
        digest.update("\n".join(instance.image_ref.value).encode())
        digests.append(digest.digest())
    return np.frombuffer(b"".join(digests), ">u8").astype(np.uint64)
