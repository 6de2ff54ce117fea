"""Image files by name: the files of a directory, or the members of tars, behind one call.

A failure of the image root itself (a missing directory, a lost disk) is an error, and never a
failure of each image. Must not import torch.
"""

from __future__ import annotations

import os
import re
import unicodedata
from functools import cache, lru_cache
from pathlib import Path

from d2i.errors import ConfigError, DataError
from d2i.images.decode import ImageRejectedError, is_lfs_pointer
from d2i.images.file_kind import HEAD_BYTES, file_kind
from d2i.images.tar_index import Member, TarIndex, is_tars, open_index
from d2i.io import storage

_NUM_ALIKE = 8
_WEB_URL = re.compile(r"(^|::)https?:", re.IGNORECASE)
"""Also below another file system: `simplecache::https://…`."""
_EXPECTED = "expected a directory of images, x.tar or DIR/*.tar"


def check_root(root: str) -> None:
    """Refuse an image root that is missing or unusable; for tars, build the index.

    Args:
        root: As for `read_image`.

    Raises:
        ConfigError: If it is a web URL.
        DataError: If it is missing, an empty directory, a file, or not an intact tar.
    """
    _refuse_web_url(root)
    if is_tars(root):
        _index(root)
    else:
        _check_directory(root)


def read_image(root: str, path: str, max_bytes: int) -> bytes:
    """Read the bytes of an image file.

    Args:
        root: A directory (any fsspec URL but a web URL), `x.tar`, or `images/*.tar`.
        path: The image's name below it; the leading directories of a tar member may be left out.
            If no file has the exact name, another Unicode form of it (NFC, NFD) is accepted.
        max_bytes: Its maximum length.

    Raises:
        ImageRejectedError: `missing_file`, `read_error`, `too_many_bytes` or `lfs_pointer`; also
            `ambiguous_file` if several different files have that name, and in a tar
            `refused_member` (a link or a device).
        ConfigError: If the root is a web URL, which is never requested.
        DataError: If the root itself is missing (or has gone) or cannot be read.
    """
    _refuse_web_url(root)
    data = _read_member(root, path, max_bytes) if is_tars(root) else _read(root, path, max_bytes)
    if len(data) > max_bytes:
        raise ImageRejectedError("too_many_bytes", f"over {max_bytes} bytes")
    if is_lfs_pointer(data):
        raise ImageRejectedError("lfs_pointer", "a Git LFS pointer; run 'git lfs pull' there")
    return data


def _refuse_web_url(root: str) -> None:
    """Refuse web URLs, which may redirect anywhere: only the SSRF guard requests them."""
    if _WEB_URL.search(root):
        raise ConfigError(
            f"{root}: got a web URL as the image root; expected a directory, tars or an object "
            "store; give --set 'fetch.mirror=URL/{path}' to 'd2i preprocess', or copy the images "
            "first"
        )


def _check_directory(root: str) -> None:
    try:
        found = None if storage.is_directory(root) else _what_is_at(root)
        if found is None and _is_empty(root):
            found = "an empty directory"
    except OSError as err:
        raise DataError(
            f"{root}: the image root cannot be read ({err.strerror or err}); {_EXPECTED}; "
            "check corpus.image_root, and whether its disk is mounted"
        ) from err
    if found:
        raise DataError(
            f"{root}: got {found} as the image root; {_EXPECTED}; unpack it, or check "
            "corpus.image_root and whether its disk is mounted"
        )


def _what_is_at(root: str) -> str:
    if not storage.exists(root):
        return "nothing"
    return file_kind(storage.read_head(root, HEAD_BYTES)) or "a file"


def _is_empty(root: str) -> bool:
    """Return whether a local directory is empty, as a mount point without its disk is.

    Object stores have no empty directories.
    """
    local = storage.local_path(root)
    if local is None:
        return False
    with os.scandir(local) as entries:
        return all(entry.name.startswith(".") for entry in entries)


def _read(root: str, path: str, max_bytes: int) -> bytes:
    """Read a file of a directory; it counts as missing or damaged only if the directory is fine."""
    if ".." in path.split("/"):
        raise ImageRejectedError(
            "read_error", "the path contains '..'; expected a path below the image root"
        )
    try:
        return _read_head(root, path, max_bytes + 1)
    except FileNotFoundError as err:
        _check_directory(root)
        raise ImageRejectedError("missing_file", "no such file") from err
    except (OSError, ValueError) as err:
        # A name with a zero byte raises ValueError.
        _check_directory(root)
        raise ImageRejectedError("read_error", str(err)) from err


def _read_head(root: str, path: str, num_bytes: int) -> bytes:
    local = storage.local_path(root)
    if local is None:
        if "::" in path:
            raise ValueError("got a chain of file systems, expected a path below the directory")
        return storage.read_head(storage.join(root, path), num_bytes)
    try:
        return storage.read_local_head(f"{local}/{path}", num_bytes)
    except FileNotFoundError:
        if path.isascii():
            raise
        return storage.read_local_head(_in_other_form(str(local), path), num_bytes)


def _in_other_form(directory: str, path: str) -> str:
    """Return the file whose name is another Unicode form of the path, found by listing.

    Raises:
        FileNotFoundError: If there is none.
        OSError: If a directory cannot be listed.
        ImageRejectedError: `ambiguous_file` if there are several.
    """
    for part in path.split("/"):
        alike = [part]
        if not part.isascii():
            names = _names_by_composed(directory, Path(directory).stat().st_mtime_ns)
            alike = names.get(unicodedata.normalize("NFC", part), [])
        if not alike:
            raise FileNotFoundError
        if len(alike) > 1 and part not in alike:
            raise ImageRejectedError(
                "ambiguous_file", f"{len(alike)} names differ only in their Unicode form"
            )
        directory = f"{directory}/{part if part in alike else alike[0]}"
    return directory


@lru_cache(maxsize=32)
def _names_by_composed(directory: str, changed_ns: int) -> dict[str, list[str]]:
    """Return the non-ASCII names in a directory, by their composed form."""
    del changed_ns  # A directory that has changed is listed again.
    found: dict[str, list[str]] = {}
    for name in os.listdir(directory):  # noqa: PTH208
        if not name.isascii():
            found.setdefault(unicodedata.normalize("NFC", name), []).append(name)
    return found


@cache
def _index(root: str) -> TarIndex:
    """Return the index of the tars, opened once per process."""
    try:
        return open_index(root)
    except OSError as err:
        raise DataError(
            f"{root}: cannot be read ({err}); expected tars of images; check corpus.image_root, "
            "and whether its disk is mounted"
        ) from err


def _read_member(root: str, path: str, max_bytes: int) -> bytes:
    found = _index(root).find(path)
    if not found:
        raise ImageRejectedError("missing_file", "no such file")
    if len(found) > _NUM_ALIKE:
        raise ImageRejectedError("ambiguous_file", f"{len(found)} members have this name")
    contents = {_read_range(member, max_bytes) for member in found}
    if len(contents) > 1:
        raise ImageRejectedError("ambiguous_file", "different members have this name")
    return contents.pop()


def _read_range(member: Member | None, max_bytes: int) -> bytes:
    if member is None:
        raise ImageRejectedError("refused_member", "a link or a device, not a file")
    if member.size_bytes > max_bytes:
        raise ImageRejectedError("too_many_bytes", f"over {max_bytes} bytes")
    try:
        data = storage.read_range(member.url, member.offset, member.size_bytes)
    except FileNotFoundError as err:
        raise DataError(
            f"{member.url}: the tar is gone; expected it to stay while its images are read; "
            "check whether its disk is mounted"
        ) from err
    except OSError as err:
        raise ImageRejectedError("read_error", str(err)) from err
    if len(data) != member.size_bytes:
        raise ImageRejectedError("read_error", f"{member.url} ends before the member does")
    return data
