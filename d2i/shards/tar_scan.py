"""One pass over a tar that d2i did not write: its samples, their members, its checksums.

Members are grouped as webdataset groups them, except that files hidden in a directory and names
that end in a dot belong to no sample. The tar is untrusted: nothing in it is followed, unpickled or
held in memory whole. Must not import torch or ray.
"""

from __future__ import annotations

import hashlib
import io
import re
import tarfile
import warnings
import zlib
from collections import Counter
from dataclasses import dataclass
from math import prod
from typing import IO, Any, NoReturn

import numpy as np

from d2i.errors import ShardError
from d2i.images.tar_index import describe_damaged_tar
from d2i.io import storage
from d2i.shards.commit import FileInfo
from d2i.shards.index import Extent, IndexRow
from d2i.shards.layout import ArrayInfo
from d2i.shards.tar_set import ARRAY_DTYPES

_CHUNK_SIZE_BYTES = 1 << 20
_MAX_HEADER_BYTES = 1 << 20
"""Maximum size of a long name or its attributes; a larger one is an attack (our limit)."""
_MAX_SUFFIXES = 256
"""Maximum number of suffixes in a tar: each has columns in the index (our limit)."""
# webdataset passes over these names, too.
_META = re.compile(r"__[^/]*__(/|$)")


@dataclass(frozen=True)
class ScannedTar:
    """The content of a tar.

    Attributes:
        rows: Its samples in order, with the extent of each member.
        suffixes: The suffixes of its members, sorted.
        arrays: The `.npy` members that all samples have in one dtype and shape.
        info: Size and sha256 of the tar.
        num_other_files: Files that belong to no sample: without a suffix, hidden, or `__NAME__`.
    """

    rows: list[IndexRow]
    suffixes: tuple[str, ...]
    arrays: dict[str, ArrayInfo]
    info: FileInfo
    num_other_files: int


def scan_tar(url: str) -> ScannedTar:
    """Read a whole tar once.

    Raises:
        ShardError: If it is damaged, truncated or compressed, repeats a key or a member, or holds a
            link or a sparse file.
        OSError: If it cannot be read.
    """
    try:
        with storage.open_url(url) as raw:
            file = _HashedFile(raw)
            scan = _scan(file)
            file.finish()
    except (tarfile.TarError, ValueError, RecursionError) as err:
        raise ShardError(describe_damaged_tar(url, err)) from err
    except ShardError as err:
        raise ShardError(f"{url}: {err}") from err
    return ScannedTar(
        rows=[IndexRow(key, extents) for key, extents in scan.extents.items()],
        suffixes=tuple(sorted(scan.counts)),
        arrays=scan.arrays(),
        info=file.info(),
        num_other_files=scan.num_other_files,
    )


def split_name(name: str) -> tuple[str, str] | None:
    """Split a member's name into key and suffix; None if it belongs to no sample.

    The suffix, in lower case, follows the first dot of the file's own name; the key is what comes
    before it, directories included.
    """
    directory, slash, own = name.rpartition("/")
    stem, _, suffix = own.partition(".")
    if not stem or not suffix or _META.match(name):
        return None
    return f"{directory}{slash}{stem}", suffix.lower()


def npy_array_info(head: bytes, size_bytes: int) -> ArrayInfo | None:
    """Describe an npy member; None if it is not an array of plain numbers in C order.

    Args:
        head: The first bytes of the member, its header included.
        size_bytes: Size of the member.
    """
    stream = io.BytesIO(head)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # headers of Python 2 are read, too
            version = np.lib.format.read_magic(stream)
            read_header = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }[version]
            shape, is_fortran, dtype = read_header(stream)
    except (ValueError, KeyError, SyntaxError, RecursionError, MemoryError):
        return None
    is_plain = dtype.name in ARRAY_DTYPES and dtype.isnative and dtype.names is None
    if not is_plain or 0 in shape or (is_fortran and len(shape) > 1):
        return None
    if stream.tell() + dtype.itemsize * prod(shape) != size_bytes:
        return None
    return ArrayInfo(dtype=dtype.name, shape=shape)


class _Scan:
    """The samples found so far."""

    def __init__(self) -> None:
        self.extents: dict[str, dict[str, Extent]] = {}
        self.counts: Counter[str] = Counter()
        self.num_other_files = 0
        self._key: str | None = None
        self._arrays: dict[str, ArrayInfo | None] = {}

    def add(self, name: str, extent: Extent, head: bytes) -> None:
        """Add a member; `head` is its first bytes."""
        if not name.isascii() and name != name.encode(errors="ignore").decode():
            raise ShardError(f"{name!r} is not UTF-8; expected names in UTF-8; rename the file")
        split = split_name(name)
        if split is None:
            self.num_other_files += 1
            return
        key, suffix = split
        if key != self._key:
            if key in self.extents:
                raise ShardError(
                    f"key {key!r} occurs twice; expected the members of a sample side by side, and "
                    "each key once in a tar; write the tar again in that order"
                )
            self._key, self.extents[key] = key, {}
        if suffix in self.extents[key]:
            raise ShardError(
                f"{name!r} occurs twice; expected each member once; write the tar again"
            )
        self.extents[key][suffix] = extent
        self.counts[suffix] += 1
        if len(self.counts) > _MAX_SUFFIXES:
            raise ShardError(
                f"more than {_MAX_SUFFIXES} suffixes, such as {suffix[:40]!r}; expected a few: a "
                "key ends at the first dot of a file's name; write the tar with no dot in keys"
            )
        if suffix == "npy" or suffix.endswith(".npy"):
            self._note_array(suffix, npy_array_info(head, extent.size_bytes))

    def arrays(self) -> dict[str, ArrayInfo]:
        """Return the arrays that all samples have in one dtype and shape, by name."""
        return {
            suffix.removesuffix(".npy"): array
            for suffix, array in sorted(self._arrays.items())
            if array is not None
            and self.counts[suffix] == len(self.extents)
            # Another array has that name.
            and suffix != "npy.npy"
        }

    def _note_array(self, suffix: str, array: ArrayInfo | None) -> None:
        if self._arrays.setdefault(suffix, array) != array:
            self._arrays[suffix] = None


def _scan(file: _HashedFile) -> _Scan:
    scan, opened = _Scan(), _opened(file)
    with opened as tar:
        while member := tar.next():
            # tarfile would keep them all in memory.
            tar.members = []
            if member.isdir():
                continue
            if not member.isreg() or member.issparse():
                _refuse_kind(member)
            crc32, head = file.read_member(member.offset_data, member.size)
            scan.add(member.name, Extent(member.offset_data, member.size, crc32), head)
            file.seek(tar.offset)
    return scan


def _refuse_kind(member: tarfile.TarInfo) -> NoReturn:
    raise ShardError(
        f"{member.name!r} is a link, a device or a sparse file; expected regular files and "
        "directories; write the tar again with the files themselves"
    )


def _opened(file: _HashedFile) -> Any:
    headers: Any = file
    return tarfile.open(fileobj=headers, mode="r:", encoding="utf-8", tarinfo=_Member)


class _Member(tarfile.TarInfo):
    """A member whose map of a sparse file is not read: it may be of any length, or damaged."""

    def _proc_sparse(self, _tar: Any) -> NoReturn:
        _refuse_kind(self)

    def _proc_gnusparse(self, member: tarfile.TarInfo, *_: Any) -> NoReturn:
        _refuse_kind(member)

    # The three versions in PAX headers.
    _proc_gnusparse_00 = _proc_gnusparse_01 = _proc_gnusparse_10 = _proc_gnusparse


class _HashedFile:
    """A tar read from front to back, each byte hashed once; limits the length of a header."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._sha256 = hashlib.sha256()
        self._position = 0
        self._last = b""

    def tell(self) -> int:
        """Return the number of bytes read."""
        return self._position

    def seek(self, position: int) -> None:
        """Read up to a position, or to the end of the file."""
        while self._position < position and self._take(position - self._position):
            pass

    def read(self, size_bytes: int) -> bytes:
        """Read a header."""
        if not 0 <= size_bytes <= _MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size_bytes} bytes")
        self._last = self._take(size_bytes)
        return self._last

    def read_member(self, offset: int, size_bytes: int) -> tuple[int, bytes]:
        """Read the content of a member; return its CRC-32 and its first bytes."""
        if size_bytes < 0:
            raise tarfile.ReadError(f"a member of {size_bytes} bytes")
        self.seek(offset)
        crc32, head, left = 0, b"", size_bytes
        while left:
            chunk = self._take(left)
            if not chunk:
                raise tarfile.ReadError(f"it ends {left} bytes before the end of a member")
            crc32, head, left = zlib.crc32(chunk, crc32), head or chunk, left - len(chunk)
        return crc32, head

    def finish(self) -> None:
        """Read what follows the last member: zeros, of which the first block was just read."""
        if self._last != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError(f"no member and no end at byte {self._position}")
        while chunk := self._take(_CHUNK_SIZE_BYTES):
            if any(chunk):
                raise tarfile.ReadError(
                    "bytes follow its end: readers would not see them, as in tars that were "
                    "appended to one another"
                )

    def info(self) -> FileInfo:
        """Return size and sha256 of the bytes read."""
        return FileInfo(size_bytes=self._position, sha256=self._sha256.hexdigest())

    def _take(self, size_bytes: int) -> bytes:
        data = self._file.read(min(size_bytes, _CHUNK_SIZE_BYTES))
        self._sha256.update(data)
        self._position += len(data)
        return data
