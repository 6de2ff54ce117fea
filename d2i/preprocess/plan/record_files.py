"""The record: one instance as a row of a planned shard's Parquet file.

Its columns are listed in docs/format.md, Prepared data.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from d2i.dialog import ImageRef, Instance, Turn
from d2i.errors import ShardError
from d2i.io import storage
from d2i.io.checksums import compare, sha256_of
from d2i.io.parse import damaged, parse_parquet

PLAN_AGAIN = (
    "restore it, or remove plan/plan.json beside it and repeat the d2i preprocess command, which "
    "makes the same plan again"
)
_TURN = pa.struct([("speaker", pa.int8()), ("text", pa.string())])
_REF = pa.struct([("kind", pa.string()), ("value", pa.list_(pa.string()))])
SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("split", pa.string()),
        ("dialog_id", pa.string()),
        ("turn", pa.int32()),
        ("image", pa.int32()),
        ("context", pa.list_(_TURN)),
        ("image_ref", _REF),
        ("direction", pa.string()),
        ("description", pa.string()),
        ("labels", pa.list_(pa.string())),
        ("description_by", pa.string()),
    ]
)


def records_table(instances: Sequence[Instance]) -> pa.Table:
    """Return instances as a table of `SCHEMA`, in their order.

    Built column by column: a corpus has millions of rows, and a dict per row costs ten times as
    much.
    """
    contexts = [instance.context for instance in instances]
    turns = list(itertools.chain.from_iterable(contexts))
    speakers = _speakers([turn.speaker for turn in turns])
    texts = pa.array([turn.text for turn in turns], pa.string())
    spoken = pa.StructArray.from_arrays([speakers, texts], fields=list(_TURN))
    refs = [instance.image_ref for instance in instances]
    kinds = _repeated([ref.kind for ref in refs])
    places = _lists([ref.value for ref in refs])
    columns = [
        pa.array([instance.key for instance in instances], pa.string()),
        _repeated([instance.split for instance in instances]),
        pa.array([instance.dialog_id for instance in instances], pa.string()),
        pa.array([instance.turn for instance in instances], pa.int32()),
        pa.array([instance.image for instance in instances], pa.int32()),
        pa.ListArray.from_arrays(_offsets(contexts), spoken),
        pa.StructArray.from_arrays([kinds, places], fields=list(_REF)),
        _repeated([instance.direction for instance in instances]),
        _repeated([instance.description for instance in instances]),
        _lists([instance.labels for instance in instances]),
        _repeated([instance.description_by for instance in instances]),
    ]
    return pa.Table.from_arrays(columns, schema=SCHEMA)


def read_records(url: str, sha256: str | None) -> list[Instance]:
    """Read the instances of one planned shard, in their order.

    Args:
        url: The file.
        sha256: Of its bytes, from the plan; None for older plans, which have none.

    Raises:
        ShardError: If it is not the file that was planned.
    """
    data = storage.read_bytes(url)
    refused: dict[str, Any] = {"next_step": PLAN_AGAIN, "error": ShardError}
    compare(url, sha256_of(data), sha256, where="the plan", **refused)
    table = parse_parquet(data, url, SCHEMA, **refused)
    try:
        return [_instance(row) for row in table.to_pylist()]
    except (TypeError, KeyError, ValueError) as err:
        raise damaged(url, repr(err), "the records of a plan", **refused) from err


def table_bytes(table: pa.Table) -> memoryview:
    """Encode an Arrow table as Parquet."""
    # Arrow's own buffer, as threads that write to a Python file would block each other.
    buffer = pa.BufferOutputStream()
    # Rows are read whole and hardly repeat: dictionaries and statistics would save nothing.
    pq.write_table(table, buffer, compression="lz4", use_dictionary=False, write_statistics=False)
    return memoryview(buffer.getvalue())


def write_records(url: str, table: pa.Table, *, sync_name: bool = True) -> str:
    """Write the records of a planned shard atomically; return their sha256.

    `sync_name` is that of `storage.publish_atomically`.
    """
    data = table_bytes(table)
    with storage.new_file(url, sync_name=sync_name) as path:
        path.write_bytes(data)  # In one write: Arrow's many small ones take much longer.
    return sha256_of(data)


def instance_values(instance: Instance) -> dict[str, object]:
    """Return an instance as plain values, without the reference of its image."""
    return {
        "key": instance.key,
        "split": instance.split,
        "dialog_id": instance.dialog_id,
        "turn": instance.turn,
        "image": instance.image,
        "context": [{"speaker": t.speaker, "text": t.text} for t in instance.context],
        "direction": instance.direction,
        "description": instance.description,
        "labels": list(instance.labels),
        "description_by": instance.description_by,
    }


def _repeated(values: list[str | None]) -> pa.Array:
    """Return a string array; fast if all values are equal, as they mostly are."""
    if values and values.count(values[0]) == len(values):
        return pa.repeat(pa.scalar(values[0], pa.string()), len(values))
    return pa.array(values, pa.string())


def _speakers(values: list[int | None]) -> pa.Array:
    """Return the array of speakers; fast if all are None, as in MMDialog."""
    if values.count(None) == len(values):
        return pa.nulls(len(values), pa.int8())
    return pa.array(values, pa.int8())


def _offsets(parts: Sequence[Sequence[object]]) -> pa.Array:
    offsets = np.zeros(len(parts) + 1, np.int32)
    np.cumsum(np.fromiter(map(len, parts), np.int32, len(parts)), out=offsets[1:])
    return pa.array(offsets)


def _lists(parts: Sequence[tuple[str, ...]]) -> pa.Array:
    texts = list(itertools.chain.from_iterable(parts))
    return pa.ListArray.from_arrays(_offsets(parts), pa.array(texts, pa.string()))


def _instance(row: dict[str, object]) -> Instance:
    values = dict(row)
    context, image_ref, labels = (
        values.pop("context"),
        values.pop("image_ref"),
        values.pop("labels"),
    )
    return Instance(
        context=tuple(Turn(**turn) for turn in context),  # type: ignore[attr-defined]
        image_ref=ImageRef(image_ref["kind"], tuple(image_ref["value"])),  # type: ignore[index]
        labels=tuple(labels),  # type: ignore[arg-type]
        **values,  # type: ignore[arg-type]
    )
