"""The `json` member of a sample: its fields, and what they require of the other members.

Must not import torch or ray.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from d2i.errors import ShardError
from d2i.shards.sample import IMAGE_SUFFIXES, Sample, check_json

_Count = Annotated[int, Meta(ge=0)]
_Size = Annotated[int, Meta(ge=1)]


class _Turn(Struct, forbid_unknown_fields=True):
    speaker: Annotated[int, Meta(ge=-128, le=127)] | None
    text: str


class _Source(Struct, forbid_unknown_fields=True):
    ref: Annotated[list[str], Meta(min_length=1)]
    sha256: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
    size_bytes: _Size
    width: _Size
    height: _Size


class _Metadata(Struct, forbid_unknown_fields=True):
    key: str
    split: Literal["train", "valid", "test"]
    dialog_id: str
    turn: _Count
    image: _Count
    context: list[_Turn]
    direction: Literal["answer", "first"]
    description: str | None
    labels: list[str]
    description_by: str | None
    source: _Source


# msgspec resolves a type when it is first used, and crashes if two threads do so at once; a decoder
# does it here, while the module is imported.
msgspec.json.Decoder(_Metadata)


def check_metadata(key: str, value: Mapping[str, Any]) -> None:
    """Reject a decoded `json` member with a missing or unknown field, or of another sample.

    Raises:
        ShardError: If so; it names the field.
    """
    try:
        metadata = msgspec.convert(value, _Metadata)
    except msgspec.ValidationError as err:
        raise ShardError(f"sample {key}: the json member is not valid: {err}") from err
    if metadata.key != key:
        raise ShardError(f"sample {key}: the json member belongs to {metadata.key[:100]!r}")


def check_sample(sample: Sample) -> None:
    """Reject a sample whose `json` member is invalid, or that lacks a required image.

    Raises:
        ShardError: If so; it names the reason.
    """
    value = check_json(sample.members["json"])
    check_metadata(sample.key, value)
    if value["split"] != "train" and not any(s in sample.members for s in IMAGE_SUFFIXES):
        raise ShardError(f"sample {sample.key}: has no image; expected one in {value['split']}")
