"""The record: one instance as a row of a planned shard's Parquet file (DESIGN, section 4)."""

from __future__ import annotations

import io
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from d2i import storage
from d2i.dialog import ImageRef, Instance, Turn

SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("split", pa.string()),
        ("dialog_id", pa.string()),
        ("turn", pa.int32()),
        ("image", pa.int32()),
        ("context", pa.list_(pa.struct([("speaker", pa.int8()), ("text", pa.string())]))),
        ("image_ref", pa.struct([("kind", pa.string()), ("value", pa.list_(pa.string()))])),
        ("direction", pa.string()),
        ("description", pa.string()),
        ("labels", pa.list_(pa.string())),
    ]
)


def write_records(url: str, instances: Sequence[Instance]) -> None:
    """Write the instances of one planned shard, in their order, complete or not at all."""
    write_table(url, pa.Table.from_pylist([_row(instance) for instance in instances], SCHEMA))


def read_records(url: str) -> list[Instance]:
    """Read the instances of one planned shard, in their order."""
    table = pq.read_table(io.BytesIO(storage.read_bytes(url)), schema=SCHEMA)
    return [_instance(row) for row in table.to_pylist()]


def write_table(url: str, table: pa.Table) -> None:
    """Write an Arrow table as Parquet, complete or not at all."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    storage.write_bytes(url, buffer.getvalue())


def instance_values(instance: Instance) -> dict[str, object]:
    """Return an instance as plain values, all but where its picture is to be had."""
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
    }


def _row(instance: Instance) -> dict[str, object]:
    ref = instance.image_ref
    return instance_values(instance) | {"image_ref": {"kind": ref.kind, "value": list(ref.value)}}


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
