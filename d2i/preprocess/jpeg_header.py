"""What a JPEG has before its first scan, told without a decoder.

Pillow joins the parts of a header as it reads them, keeps all others, and takes what lies between
them a byte at a time: a header of megabytes costs seconds or hundreds of megabytes.
"""

from __future__ import annotations

import struct

_PART = struct.Struct(">BBH")
_FIRST = 2
"""Where the parts begin, after the mark of a JPEG."""
_MARK = 0xFF
_SCAN = 0xDA
_ALONE = frozenset({0x00, 0x01, _MARK, *range(0xD0, 0xDA)})
"""What has no length: fill bytes, restarts, begin and end."""
_MAX_PARTS = 200
_MAX_BYTES = 1 << 20
"""Cameras and editors write some ten parts, in at most some hundred kilobytes (ours)."""


def is_small_header(data: bytes) -> bool:
    """Say whether a JPEG's header is one part after the other, few and short, up to a scan."""
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
