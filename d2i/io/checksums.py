"""Checksums of files that d2i writes and reads back: a sha256 beside a file, a crc32 in each line.

A file on its own has `NAME.sha256` beside it, in the format of `sha256sum --check`. If that is
missing (older data, a user's own file), the file is read with one warning; if it differs, the file
is refused by name. A file of lines has a crc32 as the last field of each line.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, cast

from d2i.errors import D2IError, DataError
from d2i.io import storage

SUFFIX = ".sha256"
CRC_FIELD = "crc32"
_DIGEST = re.compile(rb"[0-9a-fA-F]{64}(?=\s|$)")
_NUM_SHOWN = 16
_RESTORE = "restore the file from a copy, or recreate it"


def sha256_of(data: bytes | memoryview) -> str:
    """Return the sha256 of some bytes, in hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def file_sha256(url: str) -> str:
    """Return the sha256 of a file, read in parts.

    Raises:
        OSError: If it cannot be read.
    """
    with storage.open_url(url) as file:
        return hashlib.file_digest(cast("io.BufferedReader", file), "sha256").hexdigest()


def known_sha256(url: str) -> str:
    """Return the sha256 of a file; an unchanged file is read once per process.

    Raises:
        OSError: If it cannot be read.
    """
    return _digest_once(url, _stamp(url))


def checksum_line(digest: str, name: str) -> bytes:
    """Return the line that `sha256sum --check` reads for a file called `name`."""
    return f"{digest}  {name}\n".encode()


def checksum_url(url: str) -> str:
    """Return the URL of a file's sha256, which is beside it."""
    return url + SUFFIX


def write_bytes(url: str, data: bytes) -> None:
    """Publish a whole file atomically, with its sha256 beside it.

    Writes nothing if both are already there.
    """
    digest = sha256_of(data)
    is_there = read_checksum(url) == digest and storage.exists(url)
    if not is_there or storage.read_bytes(url) != data:
        _publish(url, digest, lambda: storage.write_bytes(url, data))


@contextlib.contextmanager
def new_file(url: str) -> Iterator[Path]:
    """Yield a local file to fill, which is then published with its sha256 beside it."""
    local = storage.local_path(url)
    with storage.scratch_file(url if local is None else str(local.parent)) as scratch:
        yield scratch
        _publish(url, file_sha256(str(scratch)), lambda: storage.publish_atomically(scratch, url))


def _publish(url: str, digest: str, publish: Callable[[], None]) -> None:
    """Write the checksum, then the file.

    A file that is being replaced has no checksum meanwhile: a kill in between then leaves a file
    that is not verified, instead of one that is refused.
    """
    beside, line = checksum_url(url), checksum_line(digest, url.rpartition("/")[2])
    is_replaced = storage.exists(url)
    if is_replaced:
        storage.remove(beside)
    else:
        storage.write_bytes(beside, line)
    publish()
    if is_replaced:
        storage.write_bytes(beside, line)


def remove(url: str) -> None:
    """Remove a file and its checksum; do nothing if there is none."""
    # In this order: after a kill in between the file is still there, for the next call to remove.
    storage.remove(checksum_url(url))
    storage.remove(url)


def read_bytes(url: str, *, next_step: str = _RESTORE, error: type[D2IError] = DataError) -> bytes:
    """Read a whole file, and compare it with the sha256 beside it.

    Args:
        url: The file.
        next_step: Advice to the user about a file that differs.
        error: Class of the error that refuses it.

    Raises:
        FileNotFoundError: If there is no such file.
        D2IError: An `error`, if the file does not match its checksum.
    """
    data = storage.read_bytes(url)
    compare(url, sha256_of(data), read_checksum(url), next_step=next_step, error=error)
    return data


def check_file(url: str, *, next_step: str = _RESTORE, error: type[D2IError] = DataError) -> None:
    """Compare a file with the sha256 beside it; an unchanged file is read once per process.

    Raises:
        D2IError: An `error`, if the file does not match its checksum.
        OSError: If it cannot be read.
    """
    check_against(url, read_checksum(url), next_step=next_step, error=error)


def check_against(url: str, recorded: str | None, **refused: Any) -> None:
    """Compare a file, as `check_file`, with a recorded sha256, as `compare`.

    Raises:
        D2IError: If the file does not match its checksum.
        OSError: If it cannot be read.
    """
    compare(url, None if recorded is None else known_sha256(url), recorded, **refused)


def check_if_summed(url: str, **refused: Any) -> None:
    """Compare a file, as `check_file`, if there is a sha256 beside it; no warning if there is none.

    For files that others wrote, such as a model's directory.

    Raises:
        D2IError: If the file does not match its checksum.
        OSError: If it cannot be read.
    """
    if (recorded := read_checksum(url)) is not None:
        check_against(url, recorded, **refused)


def read_checksum(url: str) -> str | None:
    """Return the sha256 stored beside a file; None if there is none, '' if it is damaged."""
    try:
        line = storage.read_bytes(checksum_url(url))
    except (FileNotFoundError, NotADirectoryError):
        return None
    digest = _DIGEST.match(line)
    return digest[0].decode().lower() if digest else ""


def compare(
    url: str,
    found: str | None,
    recorded: str | None,
    *,
    next_step: str = _RESTORE,
    error: type[D2IError] = DataError,
    where: str | None = None,
) -> None:
    """Refuse a file whose sha256 is not the recorded one.

    Args:
        url: The file.
        found: Its sha256; None if `recorded` is None.
        recorded: The recorded sha256; None if there is none, which is only warned about.
        next_step: Advice to the user.
        error: Class of the error.
        where: The file that holds `recorded`; by default the one beside it.

    Raises:
        D2IError: An `error`, if they differ.
    """
    name = where or url.rpartition("/")[2] + SUFFIX
    if recorded is None:
        say_not_verified(url, name)
    elif found != recorded:
        expected = (
            f"{recorded[:_NUM_SHOWN]}… (from {name})" if recorded else f"a readable one in {name}"
        )
        raise error(
            f"{url} is damaged, or was edited: got sha256 {str(found)[:_NUM_SHOWN]}…, expected "
            f"{expected}; {next_step}"
        )


def json_line(values: Mapping[str, Any]) -> bytes:
    """Encode a JSON object as a line whose last field is the crc32 of all others."""
    return (json.dumps({**values, CRC_FIELD: _crc32(values)}) + "\n").encode()


def has_crc32(values: Mapping[str, Any]) -> bool:
    """Return whether the crc32 of a line's object is that of its other fields, in any order."""
    others = {name: value for name, value in values.items() if name != CRC_FIELD}
    return values.get(CRC_FIELD) == _crc32(others)


def _crc32(values: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(values, sort_keys=True).encode())


_NOT_VERIFIED: set[tuple[str, str]] = set()
"""Directory and suffix of warnings already given: one file stands for all of its kind."""


def say_not_verified(url: str, where: str) -> None:
    """Warn, once per directory and suffix, that a file has no checksum in `where`."""
    kind = url.rpartition("/")[0], url.rpartition(".")[2]
    if kind not in _NOT_VERIFIED:
        _NOT_VERIFIED.add(kind)
        log = logging.getLogger(__name__)
        log.warning("%s: not verified: no checksum found in %s", url, where)


@cache
def _digest_once(url: str, stamp: object) -> str:
    del stamp
    return file_sha256(url)


def _stamp(url: str) -> object:
    """Return a value that changes when a file does, as far as its file system shows."""
    local = storage.local_path(url)
    if local is None:
        return storage.version(url)
    status = local.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
