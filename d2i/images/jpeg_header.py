"""Check of a JPEG's header up to the first scan, without a decoder.

Pillow joins the segments of a header as it reads them, keeps all others, and reads the bytes
between them one at a time: a header of megabytes costs seconds or hundreds of megabytes.
"""

from __future__ import annotations

import struct

_PART = struct.Struct(">BBH")
_FIRST = 2
"""Offset of the first segment, after the start-of-image marker."""
_MARK = 0xFF
_SCAN = 0xDA
_ALONE = frozenset({0x00, 0x01, _MARK, *range(0xD0, 0xDA)})
"""Markers without a length: fill bytes, restarts, start and end of image."""
_MAX_PARTS = 200
_MAX_BYTES = 1 << 20
"""Limits of a header. Cameras and editors write about ten segments, a few hundred kB at most."""


def is_small_header(data: bytes) -> bool:
    """Return whether a JPEG's header is only a few short, adjacent segments up to a scan."""
    position = _FIRST
    for _ in range(_MAX_PARTS):
        if position + _PART.size > min(len(data), _MAX_BYTES):
            return False
        mark, kind, length = _PART.unpack_from(data, position)
        if mark != _MARK or kind in _ALONE:
            return False
        if kind == _SCAN:
            return True
        position += 2 + length
    return False
