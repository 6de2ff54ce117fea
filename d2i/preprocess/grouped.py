"""Instances grouped by their picture, without holding them all: rows go to disk and come back.

Rows are dealt out to files by the first bits of their picture's hash, so that each file holds a
range of hashes and can be sorted by itself. Memory is bounded by one batch and one such file.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from d2i.dialog import Instance
from d2i.preprocess.records import records_table

BUCKET_BITS = 6
"""2.74 million instances of MMDialog, about 1 GB, make 64 files of 16 MB."""
MAX_WAITING_BYTES = 32 << 20

_HASH, _RANK = "image_hash", "rank"


class GroupedInstances:
    """Takes instances in any order, and gives them back sorted by picture, then key.

    Args:
        folder: A local folder, empty, for the files between.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[int, pa.ipc.RecordBatchStreamWriter] = {}
        self._open = contextlib.ExitStack()
        self._waiting: list[pa.Table] = []
        self._num_waiting_bytes = 0

    def add(
        self,
        instances: Sequence[Instance],
        image_hashes: NDArray[np.uint64],
        ranks: NDArray[np.uint64],
    ) -> None:
        """Take a few instances, with the hash of each one's picture (N,) and its rank (N,)."""
        table = records_table(instances)
        table = table.append_column(_HASH, pa.array(image_hashes, pa.uint64()))
        table = table.append_column(_RANK, pa.array(ranks, pa.uint64()))
        self._waiting.append(table)
        self._num_waiting_bytes += table.nbytes
        if self._num_waiting_bytes > MAX_WAITING_BYTES:
            self._deal_out()

    def _deal_out(self) -> None:
        """Write the waiting rows to the files they belong to."""
        if not self._waiting:
            return
        table = pa.concat_tables(self._waiting).combine_chunks()
        self._waiting, self._num_waiting_bytes = [], 0
        hashes = table.column(_HASH).to_numpy()
        order = np.argsort(hashes)
        table, buckets = table.take(order), hashes[order] >> np.uint64(64 - BUCKET_BITS)
        starts = np.flatnonzero(np.diff(buckets, prepend=np.uint64(2**BUCKET_BITS)))
        for start, stop in zip(starts, [*starts[1:], len(order)], strict=True):
            file = self._file(int(buckets[start]), table.schema)
            file.write_table(table.slice(start, stop - start))

    def sorted_tables(self, max_rank: int) -> Iterator[tuple[pa.Table, NDArray[np.uint64]]]:
        """Give the rows up to a rank, a range of hashes at a time: records and picture hashes."""
        self._deal_out()
        self._open.close()
        for bucket in sorted(self._files):
            with pa.memory_map(str(self._path(bucket))) as file:
                table = pa.ipc.open_stream(file).read_all()
                order = _sorted_rows(table, max_rank)
                hashes = table.column(_HASH).take(order).to_numpy()
                yield table.drop_columns([_HASH, _RANK]).take(order), hashes
            self._path(bucket).unlink()

    def _file(self, bucket: int, schema: pa.Schema) -> pa.ipc.RecordBatchStreamWriter:
        if bucket not in self._files:
            file = self._open.enter_context(pa.OSFile(str(self._path(bucket)), "wb"))
            writer = pa.ipc.new_stream(file, schema)
            self._files[bucket] = self._open.enter_context(writer)
        return self._files[bucket]

    def _path(self, bucket: int) -> Path:
        return self._folder / f"{bucket:02d}.arrow"


def _sorted_rows(table: pa.Table, max_rank: int) -> pa.Array:
    """Return the places of the rows up to a rank, by picture, then key."""
    order = pc.sort_indices(table, [(_HASH, "ascending"), ("key", "ascending")])
    ranks = table.column(_RANK).to_numpy()
    return order.filter(pa.array(ranks[order.to_numpy()] <= np.uint64(max_rank)))
