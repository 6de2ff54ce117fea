"""The arrays of samples: four fixed ones in format 1, those that a data set declares in format 2.

Must not import torch or ray.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Never

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from d2i.dialog import KEY_PATTERN
from d2i.errors import ShardError
from d2i.shards.sample import (
    IMAGE_SUFFIXES,
    MAX_MEMBER_SIZE_BYTES,
    NPY_DTYPES,
    NPY_HEADER_SIZE_BYTES,
    NUM_TOKEN_IDS,
    Sample,
    check_key,
    check_members,
    npy_header,
    npy_info,
    npy_size_bytes,
)

FormatVersion = Literal[1, 2]

_SHA256 = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[a-z][a-z0-9_]{0,15}")
# The bits of infinity, without the sign, of the dtypes that have one; those of NaN are above.
_INFINITY = {"float16": 0x7C00, "bfloat16": 0x7F80}


class ArrayInfo(BaseModel):
    """Dtype and shape of one array member, the same for every sample of a data set."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    dtype: str
    shape: tuple[Annotated[int, Field(ge=1)], ...]


class DeclaredArray(ArrayInfo):
    """An array that format 2 declares.

    Attributes:
        encoder: What made it: a key of `encoders` in the fingerprint.
    """

    encoder: str


class Layout(ABC):
    """The members of a data set's samples."""

    format: ClassVar[FormatVersion]
    key_pattern = KEY_PATTERN
    max_member_size_bytes = MAX_MEMBER_SIZE_BYTES
    is_canonical = True

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """The arrays that a sample may have, in the order of its members."""

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Every suffix that a member may have, in the order of the members of a sample."""
        return ("json", *map(self.array_suffix, self.names), *IMAGE_SUFFIXES)

    def array_suffix(self, name: str) -> str:
        """Return the suffix of the member that holds an array."""
        return f"{name}.npy"

    def arrays_of(self, sample: Sample) -> dict[str, ArrayInfo]:
        """Check a whole sample, and describe each of its arrays.

        Raises:
            ShardError: If the key, a suffix, a size, the json's form or an array is not legal.
        """
        check_key(sample.key)
        try:
            check_members(sample.key, sample.members, self.suffixes)
            return self._arrays_of(sample.members)
        except ShardError as err:
            raise ShardError(f"sample {sample.key}: {err}") from err

    @abstractmethod
    def check_array(self, name: str, data: bytes) -> ArrayInfo:
        """Check a whole array member, its values included, and describe it.

        Raises:
            ShardError: If its header, dtype, shape or a value is not legal.
        """

    @abstractmethod
    def _arrays_of(self, members: Mapping[str, bytes]) -> dict[str, ArrayInfo]: ...


@dataclass(frozen=True)
class _Rule:
    """The required form of an array of format 1: its dtype and number of axes."""

    dtype: str
    rank: int


_RULES = {
    "moments": _Rule("float16", 3),
    "clip": _Rule("float16", 1),
    "tokens": _Rule("uint16", 1),
    "text": _Rule("float16", 2),
}


class _Format1(Layout):
    """moments (8, h, w), clip (clip_dim,), tokens (77 W,) and text (77 W, text_dim)."""

    format = 1
    names = tuple(_RULES)

    def check_array(self, name: str, data: bytes) -> ArrayInfo:
        dtype, shape = npy_info(data)
        if 0 in shape:
            raise ShardError(f"{name} is {dtype} {shape}; expected no axis of size 0")
        found = ArrayInfo(dtype=dtype, shape=shape)
        check_format_1({name: found})
        _check_values(name, dtype, data)
        if name == "tokens" and (largest := _values(data).max()) >= NUM_TOKEN_IDS:
            raise ShardError(f"tokens hold {largest}; expected ids below {NUM_TOKEN_IDS}")
        return found

    def _arrays_of(self, members: Mapping[str, bytes]) -> dict[str, ArrayInfo]:
        found = {
            name: self.check_array(name, members[f"{name}.npy"])
            for name in self.names
            if f"{name}.npy" in members
        }
        if {"tokens", "text"} <= set(found) and found["tokens"].shape[0] != found["text"].shape[0]:
            raise ShardError("tokens and text differ in their number of tokens")
        return found


FORMAT_1: Layout = _Format1()


def check_format_1(arrays: Mapping[str, ArrayInfo]) -> None:
    """Refuse arrays that format 1 cannot hold.

    Raises:
        ShardError: If a name, a dtype, a number of axes or an axis of fixed size differs.
    """
    for name, found in arrays.items():
        if name not in _RULES or not _fits(name, found):
            raise ShardError(
                f"{name} is {found.dtype} {found.shape}; expected in format 1: float16 moments "
                "(8, h, w), clip (clip_dim,) and text (77 W, text_dim), uint16 tokens (77 W,)"
            )


def _fits(name: str, found: ArrayInfo) -> bool:
    rule = _RULES[name]
    is_alike = (found.dtype, len(found.shape)) == (rule.dtype, rule.rank)
    return is_alike and type(found) is ArrayInfo and _leading_axis_fits(name, found.shape[0])


def _leading_axis_fits(name: str, size: int) -> bool:
    if name == "moments":
        return size == 8
    return name == "clip" or size % 77 == 0


@dataclass(frozen=True)
class DeclaredLayout(Layout):
    """The layout of format 2: every sample has every array that is declared.

    Args:
        declared: The arrays by name.

    Raises:
        ShardError: If a name, a dtype or a shape is not legal.
    """

    format = 2

    declared: Mapping[str, DeclaredArray]

    def __post_init__(self) -> None:
        for name, array in self.declared.items():
            if not _NAME.fullmatch(name) or name in ("json", *IMAGE_SUFFIXES):
                raise ShardError(
                    f"array {name[:100]!r}: expected a name of 1 to 16 characters of a-z 0-9 _ "
                    "that begins with a letter and is no suffix of an image"
                )
            if not array.shape:
                raise ShardError(f"array {name} has no axes; expected at least one")
            # Also refuses a dtype that is not known, and a shape that no header holds.
            npy_header(array.dtype, array.shape)
            if npy_size_bytes(array.dtype, array.shape) > MAX_MEMBER_SIZE_BYTES:
                raise ShardError(f"array {name} has more than {MAX_MEMBER_SIZE_BYTES} bytes")

    @property
    def names(self) -> tuple[str, ...]:
        """The declared arrays, sorted."""
        return tuple(sorted(self.declared))

    def check_array(self, name: str, data: bytes) -> DeclaredArray:
        """Check an array member against its declaration, its values included.

        Raises:
            ShardError: If it is another array, or a value is not finite.
        """
        expected = self.declared[name]
        header = npy_header(expected.dtype, expected.shape)
        size_bytes = npy_size_bytes(expected.dtype, expected.shape)
        if data[:NPY_HEADER_SIZE_BYTES] != header or len(data) != size_bytes:
            raise ShardError(
                f"{name} is not npy {expected.dtype} {expected.shape}, as the data set declares"
            )
        _check_values(name, expected.dtype, data)
        return expected

    def _arrays_of(self, members: Mapping[str, bytes]) -> dict[str, ArrayInfo]:
        absent = [name for name in self.names if f"{name}.npy" not in members]
        if absent:
            raise ShardError(f"lacks {absent[0]}, which the data set declares")
        return {name: self.check_array(name, members[f"{name}.npy"]) for name in self.names}


def layout_of(version: FormatVersion, arrays: Mapping[str, ArrayInfo]) -> Layout:
    """Return the layout that the record of a shard, or of a data set, describes.

    Raises:
        ShardError: If its arrays are not legal in that format.
    """
    if version == 1:
        check_format_1(arrays)
        return FORMAT_1
    declared = {name: array for name, array in arrays.items() if isinstance(array, DeclaredArray)}
    if len(declared) != len(arrays):
        raise ShardError("an array names no encoder; expected one in format 2")
    return DeclaredLayout(declared)


def layout_of_fingerprint(fingerprint: Mapping[str, Any] | None) -> Layout:
    """Return the layout of data made under a fingerprint, which in format 2 declares the arrays.

    Raises:
        ShardError: If it is of format 2, and does not declare them, with the encoder of each.
    """
    if fingerprint is None or not declares_arrays(fingerprint):
        return FORMAT_1
    try:
        # As JSON, in which a shape is a list.
        arrays = _DECLARED.validate_json(json.dumps(fingerprint.get("arrays")))
    except ValidationError as err:
        _refuse_arrays(err.errors()[0]["msg"])
    encoders = fingerprint.get("encoders")
    known = encoders if isinstance(encoders, Mapping) else {}
    for array in arrays.values():
        made_by = known.get(array.encoder)
        sha256 = made_by.get("sha256") if isinstance(made_by, Mapping) else None
        if not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
            _refuse_arrays(f"encoders has no sha256 of {array.encoder!r}")
    return DeclaredLayout(arrays)


def declares_arrays(fingerprint: Mapping[str, Any]) -> bool:
    """Return whether a fingerprint is that of data in format 2."""
    version = fingerprint.get("format")
    # Of the values that equal 2, JSON writes only this one as `2`.
    return type(version) is int and version == 2


_DECLARED: TypeAdapter[dict[str, DeclaredArray]] = TypeAdapter(dict[str, DeclaredArray])


def _refuse_arrays(reason: str) -> Never:
    raise ShardError(
        f"the fingerprint does not declare its arrays: {reason}; expected in format 2 arrays "
        "{NAME: {dtype, shape, encoder}}, and encoders {KEY: {sha256}} with the encoder of each"
    )


def _values(data: bytes) -> Any:
    return np.frombuffer(data, NPY_DTYPES["uint16"], offset=NPY_HEADER_SIZE_BYTES)


def _check_values(name: str, dtype: str, data: bytes) -> None:
    if dtype in _INFINITY and (_values(data) & 0x7FFF).max() >= _INFINITY[dtype]:
        raise ShardError(f"{name} holds a value that is not finite")
