"""The sample: its key, its members, and the canonical bytes of each member.

Everything on disk is canonical: one legal npy header per dtype and shape, one legal tar header
per name and size. So reading and verifying *compare* bytes and never parse untrusted input.
Owns no file; must not import torch or ray.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from d2i.dialog import KEY_PATTERN, MAX_KEY_LENGTH
from d2i.errors import ShardError

SUFFIXES = (
    "json",
    "moments.npy",
    "clip.npy",
    "tokens.npy",
    "text.npy",
    "jpg",
    "png",
    "webp",
    "gif",
)
"""Every suffix a member may have, in the order of the members of a sample."""

IMAGE_SUFFIXES = ("jpg", "png", "webp", "gif")

MAX_MEMBER_SIZE_BYTES = 1 << 28

NUM_TOKEN_IDS = 49408
"""Number of CLIP's BPE ids, its start and end tokens included."""

NPY_HEADER_SIZE_BYTES = 128
NPY_DTYPES = {"float16": "<f2", "uint16": "<u2"}
"""The byte order on disk of each dtype a member may have."""

_INFINITY = 0x7C00
"""The bits of float16's infinity; those of NaN are above."""

_NPY_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00\x76\x00"
    rb"\{'descr': '(<f2|<u2)', 'fortran_order': False, 'shape': \(([0-9, ]{1,60})\), \} *\n"
)


@dataclass(frozen=True)
class MemberSpec:
    """The required form of an array member: suffix, numpy dtype name and number of axes."""

    suffix: str
    dtype: str
    rank: int


MEMBERS: Mapping[str, MemberSpec] = {
    "moments": MemberSpec("moments.npy", "float16", 3),
    "clip": MemberSpec("clip.npy", "float16", 1),
    "tokens": MemberSpec("tokens.npy", "uint16", 1),
    "text": MemberSpec("text.npy", "float16", 2),
}
"""Array members: moments (8, h, w), clip (clip_dim,), tokens (77 W,), text (77 W, text_dim)."""


@dataclass(frozen=True)
class Sample:
    """One training sample.

    Attributes:
        key: Unique over the corpus and safe as a tar member name (`d2i.dialog.KEY_PATTERN`).
        members: The bytes of each member by suffix, out of `SUFFIXES`; `json` always, at most
            one image.
    """

    key: str
    members: Mapping[str, bytes]


def json_bytes(value: Mapping[str, Any]) -> bytes:
    """Encode a `json` member: sorted keys, no spaces, ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def npy_header(dtype: str, shape: tuple[int, ...]) -> bytes:
    """Return the canonical npy header (format 1.0, 128 bytes, little-endian, C order) of an array.

    Raises:
        ShardError: If the dtype is neither float16 nor uint16, or the shape is too long to fit.
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
        array: float16 or uint16, any shape, any memory layout.

    Raises:
        ShardError: If it has another dtype.
    """
    header = npy_header(array.dtype.name, array.shape)
    little_endian = np.dtype(NPY_DTYPES[array.dtype.name])
    return header + np.ascontiguousarray(array, dtype=little_endian).tobytes()


def npy_info(data: bytes) -> tuple[str, tuple[int, ...]]:
    """Read dtype name and shape from canonical npy bytes, checking every byte of the header.

    Raises:
        ShardError: If the header is not the one `npy_bytes` writes, or the size does not fit it.
    """
    found = _NPY_HEADER.fullmatch(data[:NPY_HEADER_SIZE_BYTES])
    if found is None:
        raise ShardError("not a float16 or uint16 npy with the canonical 128-byte header")
    dtype = "float16" if found[1] == b"<f2" else "uint16"
    shape = tuple(int(size) for size in found[2].split(b",") if size.strip())
    if npy_header(dtype, shape) != data[:NPY_HEADER_SIZE_BYTES]:
        raise ShardError(f"npy header of {dtype} {shape} is not in canonical form")
    if len(data) != npy_size_bytes(shape):
        raise ShardError(
            f"npy of {dtype} {shape} has {len(data)} bytes, not {npy_size_bytes(shape)}"
        )
    return dtype, shape


def npy_array(data: bytes) -> NDArray[Any]:
    """Decode canonical npy bytes to a read-only array.

    Raises:
        ShardError: As `npy_info`.
    """
    dtype, shape = npy_info(data)
    return np.frombuffer(data, dtype=dtype, offset=NPY_HEADER_SIZE_BYTES).reshape(shape)


def npy_size_bytes(shape: tuple[int, ...]) -> int:
    """Return the size of an npy member of 2-byte numbers, header included."""
    return NPY_HEADER_SIZE_BYTES + 2 * prod(shape)


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


def check_shape(name: str, dtype: str, shape: tuple[int, ...]) -> None:
    """Reject an array member that does not match `MEMBERS`.

    Raises:
        ShardError: If the dtype, the number of axes or an axis of fixed size differs.
    """
    spec = MEMBERS[name]
    fits = dtype == spec.dtype and len(shape) == spec.rank and min(shape) > 0
    if not fits or not _leading_axis_fits(name, shape[0]):
        raise ShardError(
            f"{name} is {dtype} {shape}; expected {spec.dtype} with {spec.rank} axes: "
            "moments (8, h, w), clip (clip_dim,), tokens (77 W,), text (77 W, text_dim)"
        )


def check_array(name: str, data: bytes) -> tuple[str, tuple[int, ...]]:
    """Check a whole array member, its values included, and return its dtype name and shape.

    Raises:
        ShardError: As `npy_info` and `check_shape`, or if a latent is not finite or a token is not
            one of CLIP's.
    """
    dtype, shape = npy_info(data)
    check_shape(name, dtype, shape)
    values = np.frombuffer(data, NPY_DTYPES["uint16"], offset=NPY_HEADER_SIZE_BYTES)
    if name == "tokens":
        if values.max() >= NUM_TOKEN_IDS:
            raise ShardError(f"tokens hold {values.max()}; expected ids below {NUM_TOKEN_IDS}")
    elif (values & 0x7FFF).max() >= _INFINITY:
        raise ShardError(f"{name} holds a value that is not finite")
    return dtype, shape


def _leading_axis_fits(name: str, size: int) -> bool:
    if name == "moments":
        return size == 8
    return name == "clip" or size % 77 == 0


def sample_arrays(sample: Sample) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Check a whole sample, and return dtype and shape of each of its arrays.

    Raises:
        ShardError: If the key, a suffix, a size, the json's form or an array is not legal.
    """
    check_key(sample.key)
    try:
        _check_members(sample.members)
        arrays = {
            name: check_array(name, sample.members[spec.suffix])
            for name, spec in MEMBERS.items()
            if spec.suffix in sample.members
        }
    except ShardError as err:
        raise ShardError(f"sample {sample.key}: {err}") from err
    if "tokens" in arrays and "text" in arrays and arrays["tokens"][1][0] != arrays["text"][1][0]:
        raise ShardError(f"sample {sample.key}: tokens and text differ in their number of tokens")
    return arrays


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


def _check_members(members: Mapping[str, bytes]) -> None:
    unknown = sorted(set(members) - set(SUFFIXES))
    if unknown:
        raise ShardError(f"member suffix {unknown[0]!r}; expected one of {', '.join(SUFFIXES)}")
    if sum(suffix in members for suffix in IMAGE_SUFFIXES) > 1:
        raise ShardError("two image members; expected at most one")
    if max((len(data) for data in members.values()), default=0) > MAX_MEMBER_SIZE_BYTES:
        raise ShardError(f"a member has more than {MAX_MEMBER_SIZE_BYTES} bytes")
    if not all(members.values()):
        raise ShardError("a member is empty")
    check_json(members.get("json", b""))
