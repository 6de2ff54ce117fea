"""Read the one record batch of an Arrow IPC file that a stranger may have written.

Arrow unpacks a compressed batch as it reads it, to whatever size the batch says, and has no option
against it; so the batch's own description is looked at first. Must not import torch or ray.
"""

from __future__ import annotations

import struct
from typing import Any

import pyarrow as pa

from d2i.errors import ShardError

_MAGIC_SIZE_BYTES = 8
_MESSAGE_HEADER = 2
_BATCH_COMPRESSION = 3
"""Places of fields in the tables `Message` and `RecordBatch` of Arrow's `Message.fbs`."""


def read_one_batch(buffer: Any, schema: pa.Schema) -> Any:
    """Read a file of one uncompressed batch, without a copy of its columns.

    Args:
        buffer: An Arrow buffer with the whole file; the batch keeps it alive.
        schema: What the file must have, metadata included.

    Raises:
        ShardError: If it has other columns, other metadata, more batches, or is compressed.
        pa.ArrowException: If it is no Arrow file; OSError and ValueError likewise.
    """
    with pa.ipc.open_file(buffer) as file:
        if not file.schema.equals(schema, check_metadata=True) or file.num_record_batches != 1:
            raise ShardError("the index has other columns; made by another version of d2i?")
    # The same file as the stream of messages that it holds.
    source = pa.BufferReader(buffer.slice(_MAGIC_SIZE_BYTES))
    found, batch = pa.ipc.read_message(source), pa.ipc.read_message(source)
    if found.type != "schema" or batch.type != "record batch":
        raise ShardError("the index is not a schema and one batch")
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
    """Give where in a flatbuffer's table a field lies; 0 where the table has none."""
    vtable = table - struct.unpack_from("<i", message, table)[0]
    at, (size_bytes,) = 4 + 2 * field, struct.unpack_from("<H", message, vtable)
    found: int = struct.unpack_from("<H", message, vtable + at)[0] if at < size_bytes else 0
    return found
