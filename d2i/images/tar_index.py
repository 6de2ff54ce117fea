"""Index of the members of plain tars, for random access to the images in them.

The tars are untrusted: links, devices and names that lead elsewhere are never followed. The index
is built once per machine and kept in the user's cache: sorted hashes of names, which all workers
map into shared memory. Must not import torch.
"""

from __future__ import annotations

import errno
import fnmatch
import hashlib
import json
import math
import os
import tarfile
import unicodedata
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from d2i.errors import DataError
from d2i.images.file_kind import HEAD_BYTES, file_kind
from d2i.io import checksums, storage

_FORMAT = 2
_NAME = "members.arrow"
_COLUMNS = {"hash": "Q", "offset": "Q", "size": "q", "tar": "I", "dropped": "B"}
_NO_FILE = -1
_NUM_DROPPED = 15
"""Maximum number of leading directories of a member's name that a lookup may leave out."""
_OTHER_FORM = 128
"""Distance added to a name that matches only in its composed form."""
_MAX_HEADER_BYTES = 1 << 20
"""Maximum size of a long name or its attributes; a larger one is an attack (our limit)."""


def is_tars(root: str) -> bool:
    """Return whether an image root names tars: `x.tar`, or `images/*.tar`."""
    return root.endswith(".tar")


@dataclass(frozen=True)
class Member:
    """A regular file within a tar."""

    url: str
    offset: int
    size_bytes: int


class TarIndex:
    """Positions of the members of some tars.

    Args:
        urls: The tars.
        path: The index file.
    """

    def __init__(self, urls: list[str], path: Path) -> None:
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        columns = {name: table[name].chunk(0).to_numpy() for name in _COLUMNS}
        self._urls = urls
        self._hashes: NDArray[np.uint64] = columns.pop("hash")
        self._columns = columns

    def __len__(self) -> int:
        """Return the number of names that can be looked up, shorter forms included."""
        return len(self._hashes)

    def find(self, path: str) -> list[Member | None]:
        """Return the members called `path`, or else ending in it; None for a link or device.

        A member `a/b/1.jpg` is found as `b/1.jpg` and `1.jpg` too. If no name matches exactly, one
        in another Unicode form does. Names are distinguished by 64 bits of their BLAKE2 hash.
        """
        return self._find(path) or ([] if path.isascii() else self._find(_composed(path)))

    def _find(self, path: str) -> list[Member | None]:
        wanted = name_hash(path)
        first, last = (
            int(np.searchsorted(self._hashes, np.uint64(wanted), side))
            for side in ("left", "right")
        )
        rows = [{name: int(c[n]) for name, c in self._columns.items()} for n in range(first, last)]
        nearest = min((row["dropped"] for row in rows), default=0)
        return [self._member(row) for row in rows if row["dropped"] == nearest]

    def _member(self, row: dict[str, int]) -> Member | None:
        if row["size"] == _NO_FILE:
            return None
        return Member(self._urls[row["tar"]], row["offset"], row["size"])


def open_index(root: str) -> TarIndex:
    """Return the index of the tars that `root` names, built now if this machine has none yet.

    Raises:
        DataError: If there is no such tar, or one is damaged, truncated or compressed, or the index
            cannot be stored.
    """
    urls = _tars(root)
    versions = [(url, storage.version(url)) for url in urls]
    return TarIndex(
        urls, cached_table(json.dumps([_FORMAT, versions]), root, lambda: _build(urls, root))
    )


def cached_table(decided_by: str, root: str, build: Callable[[], pa.Table]) -> Path:
    """Return the file of a table in the user's cache, built now if this machine has none yet.

    Args:
        decided_by: Everything that determines its content.
        root: The image root that it indexes, for errors.
        build: Builds it; called by only the first of workers that start together.

    Raises:
        DataError: If it cannot be stored.
    """
    directory = storage.cache_directory(decided_by)
    path = directory / _NAME
    if _is_sound(path):
        return path
    _make_cache(directory, root)
    # Workers that start together wait for the first one.
    with storage.exclusive_lock(str(directory), wait_s=math.inf):
        if not _is_sound(path):
            _write(build(), path)
    return path


def _build(urls: list[str], root: str) -> pa.Table:
    table = _sorted(_read_members(urls))
    if not table.num_rows:
        raise DataError(f"{root}: the tars contain no files; check corpus.image_root")
    return table


def _make_cache(directory: Path, root: str) -> None:
    """Create the directory of the index, and check that it is writable."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if not os.access(directory, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as err:
        raise DataError(
            f"{directory}: {err.strerror}; expected a directory for the index of {root}; set "
            "XDG_CACHE_HOME to a writable directory"
        ) from err


def _tars(root: str) -> list[str]:
    directory, _, name = root.rpartition("/")
    if "*" not in name:
        urls = [root] if storage.exists(root) else []
    else:
        names = storage.list_names(directory or ".")
        urls = [
            storage.join(directory or ".", n)
            for n in fnmatch.filter(names, name)
            if not n.startswith(".")
        ]
    if not urls:
        raise DataError(
            f"{root}: no such tar; expected at least one; check corpus.image_root, and whether "
            "its disk is mounted"
        )
    return urls


@dataclass
class _Rows:
    """Columns that grow; 29 bytes per row."""

    columns: dict[str, array[int]] = field(
        default_factory=lambda: {name: array(code) for name, code in _COLUMNS.items()}
    )

    def add(self, **values: int) -> None:
        for name, column in self.columns.items():
            column.append(values[name])


def _read_members(urls: list[str]) -> _Rows:
    rows = _Rows()
    for number, url in enumerate(urls):
        for member in _members(url):
            parts = [part for part in member.name.split("/") if part not in ("", ".")]
            if member.isdir() or member.name.startswith("/") or ".." in parts or not parts:
                continue
            size = member.size if member.isreg() and not member.issparse() else _NO_FILE
            for dropped in range(min(len(parts) - 1, _NUM_DROPPED) + 1):
                for name, distance in _forms("/".join(parts[dropped:]), dropped):
                    rows.add(
                        hash=name_hash(name),
                        offset=member.offset_data,
                        size=size,
                        tar=number,
                        dropped=distance,
                    )
    return rows


def _forms(name: str, dropped: int) -> Iterator[tuple[str, int]]:
    """Yield the names that a member is found by, and the distance of each from its own."""
    yield name, dropped
    if not name.isascii() and (composed := _composed(name)) != name:
        yield composed, dropped + _OTHER_FORM


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _members(url: str) -> Iterator[tarfile.TarInfo]:
    """Yield the headers of a tar, which must be intact."""
    try:
        with storage.open_url(url) as file:
            headers: Any = _Headers(file)
            with tarfile.open(fileobj=headers, mode="r:") as tar:
                while member := tar.next():
                    yield member
                    # tarfile would keep them all in memory.
                    tar.members = []  # type: ignore[attr-defined]
                end = tar.offset
            file.seek(end)
            if file.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
                raise tarfile.ReadError(f"no member and no end at byte {end}")
    except (tarfile.TarError, UnicodeError) as err:
        raise DataError(describe_damaged_tar(url, err)) from err


def describe_damaged_tar(url: str, err: Exception) -> str:
    """Return the line of a file that is no intact tar, with the kind of file that it is."""
    kind = file_kind(storage.read_head(url, HEAD_BYTES))
    found = "" if kind in (None, "a tar") else f", but {kind}"
    return (
        f"{url} is not an intact tar{found}: {err}; expected a plain one, not compressed; "
        "decompress it, or copy it again"
    )


class _Headers:
    """The file of a tar, for reading headers: it limits the length of each read."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.seek = file.seek
        self.tell = file.tell

    def read(self, size_bytes: int) -> bytes:
        if size_bytes > _MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size_bytes} bytes")
        return self._file.read(size_bytes)


def _sorted(rows: _Rows) -> pa.Table:
    order = np.argsort(np.asarray(rows.columns["hash"]), kind="stable")
    return pa.table({name: np.asarray(column)[order] for name, column in rows.columns.items()})


def _write(table: pa.Table, path: Path) -> None:
    with (
        checksums.new_file(str(path)) as scratch,
        pa.OSFile(str(scratch), "wb") as file,
        pa.ipc.new_file(file, table.schema) as writer,
    ):
        writer.write_table(table)


def _is_sound(path: Path) -> bool:
    """Return whether there is an intact index; one without a checksum is rebuilt."""
    recorded = checksums.read_checksum(str(path))
    return recorded is not None and path.exists() and checksums.file_sha256(str(path)) == recorded


def name_hash(name: str) -> int:
    """Return 64 bits of the BLAKE2 hash of a name, by which an index distinguishes names."""
    data = name.encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
