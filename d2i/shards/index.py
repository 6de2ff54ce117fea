"""The index beside each tar: one Arrow IPC file, one row per sample.

Columns: `key`, then for each suffix `S` of the layout: `S.offset` (uint64, of the member's content
in the tar; 0 = the sample has no such member), `S.size` (uint64, bytes), `S.crc32` (uint32).
Uncompressed, so that a reader can map the file and copies nothing. The file is untrusted: Arrow
decompresses a compressed batch while reading it, to whatever size the batch claims, and has no
option to prevent that; so the batch's metadata is checked first. Must not import torch or ray.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from d2i.errors import ShardError

_FIELDS = {"offset": pa.uint64(), "size": pa.uint64(), "crc32": pa.uint32()}
_MAGIC_SIZE_BYTES = 8
_MESSAGE_HEADER = 2
_BATCH_COMPRESSION = 3
"""Field positions in the tables `Message` and `RecordBatch` of Arrow's `Message.fbs`."""


class IndexForm(Protocol):
    """The columns of an index, and the limits of its values: a `Layout` or a `TarLayout`."""

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Every suffix that a member may have, in the order of the columns."""

    @property
    def key_pattern(self) -> str:
        """The regular expression that a key must match."""

    @property
    def max_member_size_bytes(self) -> int:
        """The largest size of a member."""

    @property
    def is_canonical(self) -> bool:
        """True if every tar header and npy header is the one that d2i writes."""

    def array_suffix(self, name: str) -> str:
        """Return the suffix of the member that holds an array."""


@dataclass(frozen=True)
class Extent:
    """Position of a member's content in the tar, and its zlib CRC-32."""

    offset: int
    size_bytes: int
    crc32: int


@dataclass(frozen=True)
class IndexRow:
    """One sample of the index: its key and the extent of each member it has, by suffix."""

    key: str
    extents: dict[str, Extent]


class Index:
    """A validated index: every extent lies within the tar, every key is legal."""

    def __init__(self, batch: Any, suffixes: tuple[str, ...]) -> None:
        """Wrap a record batch that `read_index` has checked."""
        self._batch = batch
        self.suffixes = suffixes

    def __len__(self) -> int:
        """Return the number of samples."""
        return cast("int", self._batch.num_rows)

    @property
    def keys(self) -> Any:
        """The keys, as an Arrow string array over the mapped file."""
        return self._batch.column("key")

    def column(self, suffix: str, field: str) -> NDArray[Any]:
        """Return `offset`, `size` or `crc32` of a member for every sample, without a copy."""
        column = self._batch.column(f"{suffix}.{field}")
        return cast("NDArray[Any]", column.to_numpy(zero_copy_only=True))

    def row(self, row: int) -> IndexRow:
        """Return the row of one sample."""
        extents = {}
        for suffix in self.suffixes:
            values = [self._batch.column(f"{suffix}.{field}")[row].as_py() for field in _FIELDS]
            if values[0]:
                extents[suffix] = Extent(*values)
        return IndexRow(self.keys[row].as_py(), extents)

    def rows(self) -> Iterator[IndexRow]:
        """Yield every row in order, faster than one `row` at a time."""
        extents = {
            suffix: list(map(Extent, *(self.column(suffix, field).tolist() for field in _FIELDS)))
            for suffix in self.suffixes
        }
        for row, key in enumerate(self.keys.to_pylist()):
            of_row = {suffix: column[row] for suffix, column in extents.items()}
            yield IndexRow(key, {suffix: at for suffix, at in of_row.items() if at.offset})


@lru_cache(maxsize=64)
def _schema(suffixes: tuple[str, ...]) -> pa.Schema:
    members = [
        pa.field(f"{suffix}.{field}", kind, nullable=False)
        for suffix in suffixes
        for field, kind in _FIELDS.items()
    ]
    return pa.schema([pa.field("key", pa.string(), nullable=False), *members])


def index_bytes(rows: Sequence[IndexRow], layout: IndexForm) -> bytes:
    """Encode an index; the same rows always give the same bytes."""
    columns = [pa.array([row.key for row in rows], pa.string())]
    absent = Extent(0, 0, 0)
    for suffix in layout.suffixes:
        extents = [row.extents.get(suffix, absent) for row in rows]
        columns.append(pa.array([extent.offset for extent in extents], pa.uint64()))
        columns.append(pa.array([extent.size_bytes for extent in extents], pa.uint64()))
        columns.append(pa.array([extent.crc32 for extent in extents], pa.uint32()))
    sink, schema = pa.BufferOutputStream(), _schema(layout.suffixes)
    with pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(pa.record_batch(columns, schema=schema))
    return cast("bytes", sink.getvalue().to_pybytes())


def read_index(buffer: Any, layout: IndexForm, *, num_samples: int, tar_size_bytes: int) -> Index:
    """Decode an index and check all of it before any offset is used.

    Args:
        buffer: An Arrow buffer (or bytes) with the whole file; the index keeps it alive.
        layout: The members that the data set's samples may have.
        num_samples: Number of rows according to the manifest.
        tar_size_bytes: The tar's size; no extent may reach past it.

    Raises:
        ShardError: If it is not a valid index.
    """
    try:
        batch = read_one_batch(pa.py_buffer(buffer), _schema(layout.suffixes))
        batch.validate(full=True)
    except (pa.ArrowException, OSError, EOFError, ValueError) as err:
        raise ShardError("the index is not a readable Arrow file") from err
    if batch.num_rows != num_samples:
        raise ShardError(f"the index has {batch.num_rows} samples; expected {num_samples}")
    if any(column.null_count for column in batch.columns):
        raise ShardError("the index has empty cells")
    index = Index(batch, layout.suffixes)
    _check_keys(index, layout.key_pattern)
    _check_extents(index, tar_size_bytes, layout.max_member_size_bytes)
    return index


def _check_keys(index: Index, pattern: str) -> None:
    legal = pc.match_substring_regex(index.keys, rf"\A{pattern}\z")
    if len(index) and not pc.all(legal).as_py():
        raise ShardError("the index has a key that cannot name a tar member")


def _check_extents(index: Index, tar_size_bytes: int, max_member_size_bytes: int) -> None:
    for suffix in index.suffixes:
        offset, size = index.column(suffix, "offset"), index.column(suffix, "size")
        within = (offset <= tar_size_bytes) & (size <= max_member_size_bytes)
        # Both terms are small by now, so the sum cannot wrap around.
        if not np.all(within) or np.any(offset + size > tar_size_bytes):
            raise ShardError(f"the index places a {suffix} member outside the tar")
        absent = offset == 0
        if np.any(size[absent]) or np.any(index.column(suffix, "crc32")[absent]):
            raise ShardError(f"the index lists a {suffix} member without an offset in the tar")


def read_one_batch(buffer: Any, schema: pa.Schema) -> Any:
    """Read a file of one uncompressed batch, without a copy of its columns.

    Args:
        buffer: An Arrow buffer with the whole file; the batch keeps it alive.
        schema: The schema that the file must have, metadata included.

    Raises:
        ShardError: If it has other columns, other metadata, more batches, or is compressed.
        pa.ArrowException: If it is not an Arrow file; OSError and ValueError likewise.
    """
    with pa.ipc.open_file(buffer) as file:
        if not file.schema.equals(schema, check_metadata=True) or file.num_record_batches != 1:
            raise ShardError(
                "the index has unexpected columns; was it made by another version of d2i?"
            )
    # The file wraps a stream of messages; read it as that stream.
    source = pa.BufferReader(buffer.slice(_MAGIC_SIZE_BYTES))
    found, batch = pa.ipc.read_message(source), pa.ipc.read_message(source)
    if found.type != "schema" or batch.type != "record batch":
        raise ShardError("the index is not an Arrow file of exactly one record batch")
    if _is_compressed(bytes(batch.metadata)):
        raise ShardError("the index is compressed; expected plain columns that can be mapped")
    return pa.ipc.read_record_batch(batch, schema)


def _is_compressed(message: bytes) -> bool:
    try:
        (root,) = struct.unpack_from("<I", message)
        at = root + _field(message, root, _MESSAGE_HEADER)
        batch = at + struct.unpack_from("<I", message, at)[0]
        return _field(message, batch, _BATCH_COMPRESSION) != 0
    except struct.error as err:
        raise ShardError("the index is not a readable Arrow file") from err


def _field(message: bytes, table: int, field: int) -> int:
    """Return the offset of a field within a flatbuffer table; 0 if the table lacks it."""
    vtable = table - struct.unpack_from("<i", message, table)[0]
    at, (size_bytes,) = 4 + 2 * field, struct.unpack_from("<H", message, vtable)
    found: int = struct.unpack_from("<H", message, vtable + at)[0] if at < size_bytes else 0
    return found
