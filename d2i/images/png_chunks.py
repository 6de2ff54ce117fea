"""PNG files without the chunks that affect no pixel, so that none of those costs the image.

Viewers skip megabytes of text, or a metadata chunk with a wrong checksum. Pillow refuses the whole
file. Must not import any part of d2i.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

SIGNATURE = b"\x89PNG\r\n\x1a\n"
MAX_INFLATED_BYTES = 8 << 20
"""Longer colour profiles and texts are dropped, as by libpng (`PNG_USER_CHUNK_MALLOC_MAX`)."""

_HEAD = struct.Struct(">I4s")
_CHECKSUM_BYTES = 4
_ANCILLARY = 0x20
"""The bit of a chunk type's first letter that marks it as ancillary (PNG, 5.4)."""
_LETTERS = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz")
_PLAIN = frozenset({b"tRNS", b"eXIf"})
_TEXT = frozenset({b"tEXt", b"zTXt", b"iTXt"})
_ORIENTATION_TEXTS = frozenset({b"XML:com.adobe.xmp", b"Raw profile type exif", b"exif"})
_MAX_RATIO = 1032
"""The highest compression ratio of deflate."""


def without_metadata(data: bytes) -> bytes:
    """Return a PNG with only the chunks that affect pixels.

    These are image, palette, transparency, colours and orientation. Of the ancillary chunks `tRNS`,
    `iCCP`, `eXIf` and texts that hold an orientation stay, the first of each, if the checksum is
    right and they inflate to at most `MAX_INFLATED_BYTES`. Everything else is unchanged, damage
    included. Bytes that are not a PNG are returned unchanged.

    Raises:
        ValueError: If the checksum of a critical chunk other than `IDAT` is wrong; it names the
            chunk.
    """
    if not data.startswith(SIGNATURE):
        return data
    return b"".join([SIGNATURE, *_kept(data)])


def _kept(data: bytes) -> Iterator[memoryview]:
    view = memoryview(data)
    start = len(SIGNATURE)
    seen: set[bytes] = set()
    while start + _HEAD.size <= len(data):
        length, kind = _HEAD.unpack_from(data, start)
        if not _LETTERS.issuperset(kind):
            break
        body = view[start + _HEAD.size : start + _HEAD.size + length]
        end = start + _HEAD.size + length + _CHECKSUM_BYTES
        if kind[0] & _ANCILLARY:
            name = _name(kind, body) if _is_whole(view, kind, start, end) else None
            if name and name not in seen:
                seen.add(name)
                yield view[start:end]
        else:
            # Decoders do not compare the checksum of IDAT: zlib has its own.
            if kind != b"IDAT" and end <= len(data) and not _is_whole(view, kind, start, end):
                raise ValueError(f"PNG: wrong checksum of its chunk {kind.decode()}")
            yield view[start:end]
        start = end
    yield view[start:]


def _is_whole(view: memoryview, kind: bytes, start: int, end: int) -> bool:
    """Return whether a chunk is complete and its checksum right."""
    if end > len(view):
        return False
    body = view[start + _HEAD.size : end - _CHECKSUM_BYTES]
    (expected,) = struct.unpack_from(">I", view, end - _CHECKSUM_BYTES)
    return bool(zlib.crc32(body, zlib.crc32(kind)) == expected)


def _name(kind: bytes, body: memoryview) -> bytes | None:
    """Return the identity of an ancillary chunk, of which one is kept; None if it is dropped."""
    if kind in _PLAIN:
        return kind
    keyword, separator, rest = bytes(body).partition(b"\0")
    if not separator:
        return None
    if kind == b"iCCP":
        # One byte names the compression method; there is only one.
        return kind if rest[:1] == b"\0" and _is_small(rest[1:]) else None
    if kind in _TEXT and keyword in _ORIENTATION_TEXTS:
        return keyword if _is_small_text(kind, rest) else None
    return None


def _is_small_text(kind: bytes, rest: bytes) -> bool:
    if kind == b"tEXt":
        return len(rest) <= MAX_INFLATED_BYTES
    if kind == b"zTXt":
        return rest[:1] == b"\0" and _is_small(rest[1:])
    # Flag and method, then language and translated keyword, each followed by a zero byte.
    fields = rest[2:].split(b"\0", 2)
    if len(fields) < 3:
        return False
    return _is_small(fields[2]) if rest[0] else len(fields[2]) <= MAX_INFLATED_BYTES


def _is_small(packed: bytes) -> bool:
    if len(packed) * _MAX_RATIO <= MAX_INFLATED_BYTES:
        return True
    unpacking = zlib.decompressobj()
    try:
        unpacking.decompress(packed, MAX_INFLATED_BYTES)
    except zlib.error:
        return False
    return not unpacking.unconsumed_tail
