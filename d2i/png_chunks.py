"""PNG files without the chunks that decide no pixel, so that none of them costs the picture.

Viewers skip a text of megabytes, or a chunk of metadata whose checksum is wrong. Pillow refuses
the whole file for it. Must not import any part of d2i.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

SIGNATURE = b"\x89PNG\r\n\x1a\n"
MAX_INFLATED_BYTES = 8 << 20
"""Longer colour profiles and texts are left out, as by libpng (`PNG_USER_CHUNK_MALLOC_MAX`)."""

_HEAD = struct.Struct(">I4s")
_CHECKSUM_BYTES = 4
_ANCILLARY = 0x20
"""The bit of a type's first letter that says: not necessary for the picture (PNG, 5.4)."""
_LETTERS = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz")
_PLAIN = frozenset({b"tRNS", b"eXIf"})
_TEXT = frozenset({b"tEXt", b"zTXt", b"iTXt"})
_ORIENTATION_TEXTS = frozenset({b"XML:com.adobe.xmp", b"Raw profile type exif", b"exif"})
_MAX_RATIO = 1032
"""Deflate packs no more into a byte."""


def without_metadata(data: bytes) -> bytes:
    """Return a PNG with what decides pixels alone: image, palette, transparency, colours, turning.

    Of the ancillary chunks `tRNS`, `iCCP`, `eXIf` and texts that hold an orientation stay, the
    first of each, where the checksum is right and they unpack to at most `MAX_INFLATED_BYTES`. All
    else is as it was, what is broken in it included. Bytes that are no PNG are returned as is.

    Raises:
        ValueError: Naming a necessary chunk before the image data whose checksum is wrong.
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
            # Decoders compare no checksum of IDAT: zlib has one of its own.
            if kind != b"IDAT" and end <= len(data) and not _is_whole(view, kind, start, end):
                raise ValueError(f"PNG: the checksum of its chunk {kind.decode()} is wrong")
            yield view[start:end]
        start = end
    yield view[start:]


def _is_whole(view: memoryview, kind: bytes, start: int, end: int) -> bool:
    """Say whether a chunk is all there and its checksum right."""
    if end > len(view):
        return False
    body = view[start + _HEAD.size : end - _CHECKSUM_BYTES]
    (expected,) = struct.unpack_from(">I", view, end - _CHECKSUM_BYTES)
    return bool(zlib.crc32(body, zlib.crc32(kind)) == expected)


def _name(kind: bytes, body: memoryview) -> bytes | None:
    """Return by what an ancillary chunk is told from others like it; None where it is left out."""
    if kind in _PLAIN:
        return kind
    keyword, separator, rest = bytes(body).partition(b"\0")
    if not separator:
        return None
    if kind == b"iCCP":
        # One byte says how it is packed; there is but one way.
        return kind if rest[:1] == b"\0" and _is_small(rest[1:]) else None
    if kind in _TEXT and keyword in _ORIENTATION_TEXTS:
        return keyword if _is_small_text(kind, rest) else None
    return None


def _is_small_text(kind: bytes, rest: bytes) -> bool:
    if kind == b"tEXt":
        return len(rest) <= MAX_INFLATED_BYTES
    if kind == b"zTXt":
        return rest[:1] == b"\0" and _is_small(rest[1:])
    # Flag and method, then language and translated keyword, each with a zero behind it.
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
