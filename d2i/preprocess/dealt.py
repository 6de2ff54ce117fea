"""Rows dealt out on disk by the first bits of a hash, so that each part can be sorted by itself.

One file takes them all: what is dealt at once makes one batch of it a bucket. Memory is bounded by
what waits, twice, and by one bucket when it is read.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Self

import numpy as np
import pyarrow as pa

BUCKET_BITS = 6
"""2.74 million instances of MMDialog, about 1 GB, make 64 buckets of 16 MB."""
MAX_WAITING_BYTES = 16 << 20


class DealtRows:
    """Takes tables in any order, and then gives their rows back, a bucket of hashes at a time.

    Used with `with`, which ends the taking. Rows are dealt in a thread of their own, as that is
    Arrow's work while the next ones are read.

    Args:
        path: A local file that is not there yet.
        hash_column: The column, uint64, whose first bits choose the bucket.
    """

    def __init__(self, path: Path, hash_column: str) -> None:
        self._path = path
        self._hash_column = hash_column
        self._waiting: list[pa.Table] = []
        self._num_waiting_bytes = 0
        self._batches: dict[int, list[int]] = defaultdict(list)
        self._num_batches = 0
        self._writer: pa.ipc.RecordBatchFileWriter | None = None
        self._open = contextlib.ExitStack()
        self._dealing: Future[None] | None = None
        self._thread = self._open.enter_context(ThreadPoolExecutor(1))

    def __enter__(self) -> Self:
        """Begin to take rows."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file: what was taken can be given back."""
        with self._open:
            self._deal_out()
            self._wait()

    def add(self, table: pa.Table) -> None:
        """Take rows; all tables have one schema."""
        if not table.num_rows:
            return
        self._waiting.append(table)
        self._num_waiting_bytes += table.get_total_buffer_size()
        if self._num_waiting_bytes > MAX_WAITING_BYTES:
            self._deal_out()

    def buckets(self) -> Iterator[pa.Table]:
        """Give the rows bucket by bucket, the smallest hashes first, unsorted within one."""
        if not self._batches:
            return
        with pa.OSFile(str(self._path)) as file:
            reader = pa.ipc.open_file(file)
            for bucket in sorted(self._batches):
                yield pa.Table.from_batches(map(reader.get_batch, self._batches[bucket]))

    def _wait(self) -> None:
        if self._dealing is not None:
            self._dealing.result()

    def _deal_out(self) -> None:
        """Have the waiting rows written, once those before them are."""
        self._wait()
        if self._waiting:
            self._dealing = self._thread.submit(self._write, self._waiting)
            self._waiting, self._num_waiting_bytes = [], 0

    def _write(self, tables: list[pa.Table]) -> None:
        table = pa.concat_tables(tables).combine_chunks()
        hashes = table.column(self._hash_column).to_numpy()
        order = np.argsort(hashes)
        table, buckets = table.take(order), hashes[order] >> np.uint64(64 - BUCKET_BITS)
        starts = np.flatnonzero(np.diff(buckets, prepend=np.uint64(2**BUCKET_BITS)))
        for bucket in buckets[starts]:
            self._batches[int(bucket)].append(self._num_batches)
            self._num_batches += 1
        stops = [*starts[1:], len(order)]
        parts = [table.slice(a, b - a) for a, b in zip(starts, stops, strict=True)]
        # In one call, each part as a batch of its own.
        self._file(table.schema).write_table(pa.concat_tables(parts))

    def _file(self, schema: pa.Schema) -> pa.ipc.RecordBatchFileWriter:
        if self._writer is None:
            file = self._open.enter_context(pa.OSFile(str(self._path), "wb"))
            self._writer = self._open.enter_context(pa.ipc.new_file(file, schema))
        return self._writer
