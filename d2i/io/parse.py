"""Decoding of JSON, npz and Parquet that d2i wrote: any damage is one error that names the file.

The libraries raise a dozen classes for damaged bytes, and name no file. Parses bytes that the
caller read, so that a caller with their checksum compares it first. Must not import torch or ray.
"""

from __future__ import annotations

import io
import json
from typing import TYPE_CHECKING, Any

from d2i.errors import D2IError, DataError
from d2i.io import checksums

if TYPE_CHECKING:
    import pyarrow as pa
    from numpy.typing import NDArray

_MAX_REASON_CHARS = 160
_RESTORE = "restore the file from a copy, or recreate it"


def read_json(
    url: str, *, next_step: str = _RESTORE, error: type[D2IError] = DataError
) -> dict[str, Any]:
    """Read a JSON object that d2i wrote, and compare it with the sha256 beside it.

    Args:
        url: The file.
        next_step: Advice to the user about a damaged file.
        error: Class of the error.

    Raises:
        FileNotFoundError: If there is no such file.
        D2IError: An `error`, if the file is damaged.
    """
    data = checksums.read_bytes(url, next_step=next_step, error=error)
    return parse_json(data, url, next_step=next_step, error=error)


def parse_json(
    data: bytes | str,
    url: str,
    *,
    next_step: str = _RESTORE,
    error: type[D2IError] = DataError,
) -> dict[str, Any]:
    """Decode a JSON object; errors name `url` as its source.

    Raises:
        D2IError: An `error`, if it is not a JSON object.
    """
    value = parse_json_value(data, url, next_step=next_step, error=error)
    if not isinstance(value, dict):
        raise damaged(
            url, f"a JSON {type(value).__name__}, not an object", next_step=next_step, error=error
        )
    return value


def parse_json_value(
    data: bytes | str,
    url: str,
    *,
    next_step: str = _RESTORE,
    error: type[D2IError] = DataError,
) -> Any:
    """Decode any JSON value, as `parse_json`.

    Raises:
        D2IError: An `error`, if it is not JSON.
    """
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as err:
        raise damaged(url, err, "JSON", next_step=next_step, error=error) from err


def parse_npz(
    data: bytes,
    url: str,
    *,
    next_step: str = _RESTORE,
    error: type[D2IError] = DataError,
) -> dict[str, NDArray[Any]]:
    """Decode the arrays of an npz file; nothing is unpickled.

    Raises:
        D2IError: An `error`, if an array cannot be read.
    """
    import numpy as np

    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            return dict(arrays)
    except Exception as err:
        raise damaged(url, err, "an npz file", next_step=next_step, error=error) from err


def parse_parquet(
    data: bytes,
    url: str,
    schema: pa.Schema,
    *,
    next_step: str = _RESTORE,
    error: type[D2IError] = DataError,
) -> pa.Table:
    """Decode the columns of a schema from a Parquet file.

    Raises:
        D2IError: An `error`, if one cannot be read, or has another type.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(pa.BufferReader(data), pre_buffer=False)
        # In this thread alone: an Arrow thread that released the bytes at interpreter exit was seen
        # to abort a process whose work was done.
        table = file.read(schema.names, use_threads=False).cast(schema)
        table.validate(full=True)
    except Exception as err:
        raise damaged(url, err, "a Parquet file", next_step=next_step, error=error) from err
    return table


def damaged(
    url: str,
    reason: object,
    expected: str | None = None,
    *,
    next_step: str = _RESTORE,
    error: type[D2IError] = DataError,
) -> D2IError:
    """Return the error for a damaged file: what, why, what was expected, and the next step."""
    lines = str(reason).strip().splitlines() or [type(reason).__name__]
    note = f"; expected {expected}" if expected else ""
    return error(f"{url} is damaged: {lines[0][:_MAX_REASON_CHARS]}{note}; {next_step}")
