"""Read the single record batch of an untrusted Arrow IPC file.

Arrow decompresses a compressed batch while reading it, to whatever size the batch claims, and has
no option to prevent that; so the batch's metadata is checked first. Must not import torch or ray.
"""

from __future__ import annotations

import struct
from typing import Any

import pyarrow as pa

from d2i.errors import ShardError

_MAGIC_SIZE_BYTES = 8
_MESSAGE_HEADER = 2
_BATCH_COMPRESSION = 3
"""Field positions in the tables `Message` and `RecordBatch` of Arrow's `Message.fbs`."""


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
