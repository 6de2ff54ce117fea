"""The canonical USTAR form of a shard: regular files, fixed owner, mode and time.

Written here byte by byte, because the standard library's headers differ between Python versions.
"""

from __future__ import annotations

from collections.abc import Callable

from d2i.errors import ShardError

BLOCK_SIZE_BYTES = 512
END = bytes(2 * BLOCK_SIZE_BYTES)
"""Two zero blocks end an archive."""


def header(name: str, size_bytes: int) -> bytes:
    """Return the 512-byte header of a regular file, mode 0644, owner 0, time 0.

    Args:
        name: ASCII, at most 100 characters.
        size_bytes: Size of the content, below 8 GiB.
    """
    return header_form(size_bytes)(name)


def header_form(size_bytes: int) -> Callable[[str], bytes]:
    """Return a function from a file's name to its header, for files of one size."""
    before = b"0000644\0" + b"0000000\0" * 2 + b"%011o\0" % size_bytes + b"%011o\0" % 0
    after = b"0".ljust(101, b"\0") + b"ustar\x0000".ljust(255, b"\0")
    # The checksum counts itself as eight spaces.
    sum_beside_name = sum(before) + sum(b" " * 8) + sum(after)

    def form(name: str) -> bytes:
        field = name.encode("ascii").ljust(100, b"\0")
        checksum = b"%06o\0 " % (sum_beside_name + sum(field))
        block = b"".join((field, before, checksum, after))
        if len(block) != BLOCK_SIZE_BYTES:
            raise ValueError(f"name {name!r} or size {size_bytes} does not fit a USTAR header")
        return block

    return form


def read_header(block: bytes) -> tuple[str, int]:
    """Return name and size of the member that a header announces.

    Raises:
        ShardError: If it is not byte for byte what `header` returns.
    """
    try:
        name = block[:100].rstrip(b"\0").decode("ascii")
        size_bytes = int(block[124:135], 8)
        is_ours = header(name, size_bytes) == block
    except ValueError as err:
        raise ShardError("a tar header is damaged") from err
    if not is_ours:
        raise ShardError("a tar header is not written as d2i writes it")
    return name, size_bytes


def padding(size_bytes: int) -> bytes:
    """Return the zeros that fill the last block of a member."""
    return bytes(-size_bytes % BLOCK_SIZE_BYTES)


def padded_size_bytes(size_bytes: int) -> int:
    """Return the size of a member's content with its padding."""
    return size_bytes + -size_bytes % BLOCK_SIZE_BYTES
