"""The sample: its key, its members, and the canonical bytes of each member.

Everything on disk is canonical: one legal npy header per dtype and shape, one legal tar header
per name and size. So reading and verifying *compare* bytes and never parse untrusted input.
Owns no file; must not import torch or ray.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from d2i.dialog import KEY_PATTERN, MAX_KEY_LENGTH
from d2i.errors import ShardError

IMAGE_SUFFIXES = ("jpg", "png", "webp", "gif")

MAX_MEMBER_SIZE_BYTES = 1 << 28

NUM_TOKEN_IDS = 49408
"""Number of CLIP's BPE ids, its start and end tokens included."""

MAX_NAME_LENGTH = 100
"""Characters of a member's name, `K.SUFFIX`, that a tar header holds."""

NPY_HEADER_SIZE_BYTES = 128
NPY_DTYPES = {"float16": "<f2", "uint16": "<u2", "uint32": "<u4", "bfloat16": "<u2"}
"""The numbers on disk of each dtype that a member may have; npy has no bfloat16, but its bits."""

_NAMES_OF_NUMPY = {"<f2": "float16", "<u2": "uint16", "<u4": "uint32"}

_NPY_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00\x76\x00"
    rb"\{'descr': '(<f2|<u2|<u4)', 'fortran_order': False, 'shape': \(([0-9, ]{1,60})\), \} *\n"
)


@dataclass(frozen=True)
class Sample:
    """One training sample.

    Attributes:
        key: Unique over the corpus and safe as a tar member name (`d2i.dialog.KEY_PATTERN`).
        members: The bytes of each member by suffix: `json` always, `NAME.npy`, at most one image.
    """

    key: str
    members: Mapping[str, bytes]


def json_bytes(value: Mapping[str, Any]) -> bytes:
    """Encode a `json` member: sorted keys, no spaces, ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def npy_header(dtype: str, shape: tuple[int, ...]) -> bytes:
    """Return the canonical npy header (format 1.0, 128 bytes, little-endian, C order) of an array.

    Raises:
        ShardError: If the dtype is not one of `NPY_DTYPES`, or the shape is too long to fit.
    """
    if dtype not in NPY_DTYPES:
        raise ShardError(f"dtype {dtype} is not supported; expected one of {', '.join(NPY_DTYPES)}")
    text = f"{{'descr': '{NPY_DTYPES[dtype]}', 'fortran_order': False, 'shape': {shape!r}, }}"
    header = b"\x93NUMPY\x01\x00\x76\x00" + text.encode().ljust(117) + b"\n"
    if len(header) != NPY_HEADER_SIZE_BYTES:
        raise ShardError(f"shape {shape} does not fit an npy header of 128 bytes")
    return header


def npy_bytes(array: NDArray[Any]) -> bytes:
    """Encode an array as npy bytes that depend on its dtype, shape and values only.

    Args:
        array: float16, uint16 or uint32, any shape, any memory layout; the bits of bfloat16 are
            uint16.

    Raises:
        ShardError: If it has another dtype.
    """
    header = npy_header(array.dtype.name, array.shape)
    little_endian = np.dtype(NPY_DTYPES[array.dtype.name])
    return header + np.ascontiguousarray(array, dtype=little_endian).tobytes()


def npy_info(data: bytes) -> tuple[str, tuple[int, ...]]:
    """Read numpy's dtype name and the shape from canonical npy bytes, checking the whole header.

    Raises:
        ShardError: If the header is not the one `npy_bytes` writes, or the size does not fit it.
    """
    found = _NPY_HEADER.fullmatch(data[:NPY_HEADER_SIZE_BYTES])
    if found is None:
        raise ShardError("not a float16, uint16 or uint32 npy with the canonical 128-byte header")
    dtype = _NAMES_OF_NUMPY[found[1].decode()]
    shape = tuple(int(size) for size in found[2].split(b",") if size.strip())
    if npy_header(dtype, shape) != data[:NPY_HEADER_SIZE_BYTES]:
        raise ShardError(f"npy header of {dtype} {shape} is not in canonical form")
    if len(data) != (size_bytes := npy_size_bytes(dtype, shape)):
        raise ShardError(f"npy of {dtype} {shape} has {len(data)} bytes, not {size_bytes}")
    return dtype, shape


def npy_array(data: bytes) -> NDArray[Any]:
    """Decode canonical npy bytes to a read-only array.

    Raises:
        ShardError: As `npy_info`.
    """
    dtype, shape = npy_info(data)
    return np.frombuffer(data, dtype=dtype, offset=NPY_HEADER_SIZE_BYTES).reshape(shape)


def npy_size_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Return the size of an npy member, header included."""
    return NPY_HEADER_SIZE_BYTES + array_size_bytes(dtype, shape)


def array_size_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Return the size of an array's values; `dtype` is one of `NPY_DTYPES`, or numpy's name."""
    return stored_dtype(dtype).itemsize * prod(shape)


def stored_dtype(dtype: str) -> np.dtype[Any]:
    """Return numpy's dtype for the values of a member on disk."""
    return np.dtype(NPY_DTYPES.get(dtype, dtype))


def check_key(key: str) -> None:
    """Reject a key that is not safe as a tar member name.

    Raises:
        ShardError: If it does not match `d2i.dialog.KEY_PATTERN`.
    """
    if re.fullmatch(KEY_PATTERN, key) is None:
        raise ShardError(
            f"key {key[:100]!r} cannot name a tar member; expected 1 to {MAX_KEY_LENGTH} "
            "characters of A-Z a-z 0-9 _ -, not beginning with -"
        )


def check_json(data: bytes) -> dict[str, Any]:
    """Decode a `json` member.

    Raises:
        ShardError: If it is not one JSON object as `json_bytes` writes it.
    """
    try:
        value = json.loads(data)
        is_canonical = isinstance(value, dict) and json_bytes(value) == data
    except (ValueError, RecursionError) as err:
        raise ShardError("the json member is not JSON") from err
    if not is_canonical:
        raise ShardError("the json member is not an object in canonical form")
    return cast("dict[str, Any]", value)


def check_members(key: str, members: Mapping[str, bytes], suffixes: Sequence[str]) -> None:
    """Reject members that a sample must not have; arrays are checked by `d2i.shards.layout`.

    Args:
        key: The sample's key.
        members: The bytes of each member by suffix.
        suffixes: Those that are allowed.

    Raises:
        ShardError: If a suffix, a size, the number of images or the json's form is not legal.
    """
    unknown = sorted(set(members) - set(suffixes))
    if unknown:
        raise ShardError(f"member suffix {unknown[0]!r}; expected one of {', '.join(suffixes)}")
    longest = max(suffixes, key=len)
    if len(f"{key}.{longest}") > MAX_NAME_LENGTH:
        raise ShardError(
            f"its member {longest} would have a name of {len(f'{key}.{longest}')} characters; "
            f"expected at most {MAX_NAME_LENGTH}, as in a tar; shorten the array's name"
        )
    if sum(suffix in members for suffix in IMAGE_SUFFIXES) > 1:
        raise ShardError("two image members; expected at most one")
    if max((len(data) for data in members.values()), default=0) > MAX_MEMBER_SIZE_BYTES:
        raise ShardError(f"a member has more than {MAX_MEMBER_SIZE_BYTES} bytes")
    if not all(members.values()):
        raise ShardError("a member is empty")
    check_json(members.get("json", b""))
