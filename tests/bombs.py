"""Decompression bombs: small image files that are expensive to decode."""

from __future__ import annotations

import io
import struct
import zlib

from PIL import Image


def png_bomb(side: int) -> bytes:
    """Return a one-bit PNG of a few kilobytes that decodes to `side` squared pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    packed = zlib.compress(bytes((1 + side // 8) * side), 9)
    head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    parts = chunk(b"IHDR", head) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def webp_bomb(side: int) -> bytes:
    """Return a WebP header of a few bytes that declares an animation of `side` squared pixels."""
    size = (side - 1).to_bytes(3, "little")
    chunks = b"VP8X" + struct.pack("<I", 10) + b"\x02\0\0\0" + size * 2
    chunks += b"ANIM" + struct.pack("<I", 6) + bytes(6)
    small = _webp()[12:]
    frame = bytes(6) + (15).to_bytes(3, "little") * 2 + bytes(4) + small
    chunks += b"ANMF" + struct.pack("<I", len(frame)) + frame
    return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WEBP" + chunks


def _webp() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, "WEBP", lossless=True)
    return buffer.getvalue()
