"""Rows partitioned on disk by the first bits of a hash, so that each bucket can be sorted alone.

One file holds all rows: each write adds one batch per bucket. A bucket that is too large by the
end is partitioned again by the next bits. Memory is bounded by twice the waiting rows, and by one
bucket when it is read.
"""

from __future__ import annotations

import contextlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

BUCKET_BITS = 6
"""2.74 million instances of MMDialog, about 1 GB, make 64 buckets of 16 MB."""
MAX_WAITING_BYTES = 16 << 20
MAX_BUCKET_BYTES = 64 << 20
_HASH_BITS = 64


class HashPartitions:
    """Takes tables in any order, then returns their rows one bucket of hashes at a time.

    Use it in a `with` block, whose end closes the input. A separate thread partitions and writes
    rows, so that Arrow works while the next ones are read.

    Args:
        path: A local file that does not exist yet.
        hash_column: The uint64 column whose first bits select the bucket.
        num_bits_before: Leading bits that all rows have in common.
    """

    def __init__(self, path: Path, hash_column: str, num_bits_before: int = 0) -> None:
        self._path = path
        self._hash_column = hash_column
        self._num_bits_before = num_bits_before
        self._waiting: list[pa.Table] = []
        self._num_waiting_bytes = 0
        self._batches: dict[int, list[int]] = defaultdict(list)
        self._num_bytes: Counter[int] = Counter()
        self._num_batches = 0
        self._writer: pa.ipc.RecordBatchFileWriter | None = None
        self._open = contextlib.ExitStack()
        self._flushing: Future[None] | None = None
        self._thread = self._open.enter_context(ThreadPoolExecutor(1))

    def __enter__(self) -> Self:
        """Start accepting rows."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file, so that `buckets` can read it."""
        with self._open:
            self._flush()
            self._wait()

    def add(self, table: pa.Table) -> None:
        """Add rows; all tables must have the same schema."""
        if not table.num_rows:
            return
        self._waiting.append(table)
        self._num_waiting_bytes += table.get_total_buffer_size()
        if self._num_waiting_bytes > MAX_WAITING_BYTES:
            self._flush()

    def buckets(self) -> Iterator[pa.Table]:
        """Yield the rows bucket by bucket, smallest hashes first, unsorted within a bucket."""
        if not self._batches:
            return
        with pa.OSFile(str(self._path)) as file:
            reader = pa.ipc.open_file(file)
            for bucket in sorted(self._batches):
                batches = map(reader.get_batch, self._batches[bucket])
                if self._needs_repartition(bucket):
                    yield from self._repartitioned(batches)
                else:
                    yield pa.Table.from_batches(batches)

    def _needs_repartition(self, bucket: int) -> bool:
        # Rows with the same hash stay together, however many there are.
        has_bits_left = self._num_bits_before + 2 * BUCKET_BITS <= _HASH_BITS
        return has_bits_left and self._num_bytes[bucket] > MAX_BUCKET_BYTES

    def _repartitioned(self, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.Table]:
        path = self._path.with_name(f"{self._path.name}-")
        num_bits = self._num_bits_before + BUCKET_BITS
        with HashPartitions(path, self._hash_column, num_bits) as again:
            for batch in batches:
                again.add(pa.Table.from_batches([batch]))
        yield from again.buckets()
        path.unlink()

    def _wait(self) -> None:
        if self._flushing is not None:
            self._flushing.result()

    def _flush(self) -> None:
        """Start to write the waiting rows, once the previous write is done."""
        self._wait()
        if self._waiting:
            self._flushing = self._thread.submit(self._write, self._waiting)
            self._waiting, self._num_waiting_bytes = [], 0

    def _write(self, tables: list[pa.Table]) -> None:
        table = pa.concat_tables(tables).combine_chunks()
        hashes = table.column(self._hash_column).to_numpy()
        order = np.argsort(hashes)
        table, buckets = table.take(order), self._buckets_of(hashes[order])
        starts = np.flatnonzero(np.diff(buckets, prepend=np.uint64(2**BUCKET_BITS)))
        stops = [*starts[1:], len(order)]
        parts = [table.slice(a, b - a) for a, b in zip(starts, stops, strict=True)]
        for bucket, part in zip(buckets[starts].tolist(), parts, strict=True):
            self._batches[bucket].append(self._num_batches)
            self._num_bytes[bucket] += part.nbytes
            self._num_batches += 1
        # One call, in which each part becomes its own batch.
        self._file(table.schema).write_table(pa.concat_tables(parts))

    def _buckets_of(self, hashes: NDArray[np.uint64]) -> NDArray[np.uint64]:
        own_bits = hashes << np.uint64(self._num_bits_before)
        return own_bits >> np.uint64(_HASH_BITS - BUCKET_BITS)

    def _file(self, schema: pa.Schema) -> pa.ipc.RecordBatchFileWriter:
        if self._writer is None:
            file = self._open.enter_context(pa.OSFile(str(self._path), "wb"))
            self._writer = self._open.enter_context(pa.ipc.new_file(file, schema))
        return self._writer
