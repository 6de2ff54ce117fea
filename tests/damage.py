"""Damage to the files of a directory, undone afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def flipped_bit(directory: Path, pick: int, bit: int) -> Iterator[Path]:
    """Flip one bit of one file inside the context, chosen by any two numbers; yield the file."""
    files = sorted(directory.iterdir())
    path = files[pick % len(files)]
    good = path.read_bytes()
    bad = bytearray(good)
    bad[bit // 8 % len(good)] ^= 1 << bit % 8
    path.write_bytes(bad)
    try:
        yield path
    finally:
        path.write_bytes(good)
