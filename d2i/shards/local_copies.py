"""Copies of a data set's files, in a folder that processes, data sets and jobs share.

A copy is sound or absent to whoever maps one. Must not import torch or ray.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections import Counter
from pathlib import Path
from typing import Any

from d2i import storage
from d2i.errors import ConfigError, ShardError
from d2i.shards.commit import FileInfo
from d2i.shards.file_leases import FileLeases
from d2i.shards.mmap_shards import map_file

_CLAIMS_NAME = ".d2i-claims"
# What else lies in the folder is not ours: a data set's own files end otherwise.
_TAR_SUFFIX = ".d2i-tar"
_INDEX_SUFFIX = ".d2i-index"
_INDEX_FOLDER = "indexes"


class LocalCopies:
    """Copies of the files of one data set, among those of others.

    A copy is named by its content. Of the two claims on it, one is shared by all that have it
    mapped, and keeps it from being removed; the other is owned while one looks whether it is sound,
    fetches it or removes it. Who owns that one waits for nobody, so that none waits for ever: where
    a copy is gone, or another, the next one puts a new file in its place, beside what is mapped.

    Args:
        url: The data set's folder.
        folder: Where the copies lie, on a disk of this machine; made where it is not there.

    Raises:
        ConfigError: If this user cannot keep copies there.
    """

    def __init__(self, url: str, folder: Path) -> None:
        self._url, self._folder = url, folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._leases = FileLeases(folder / _CLAIMS_NAME)
        except OSError as err:
            raise ConfigError(
                f"{folder} cannot keep copies of shards ({err.strerror}); expected a folder that "
                "this user may write to, or none yet; give another --cache-dir"
            ) from err
        # Of those that this object has seen to be sound once: later ones were checked when fetched.
        self._seen: set[str] = set()

    def map(self, name: str, info: FileInfo) -> Any:
        """Map a file's copy, fetched where none is sound, and claim it until it is let go.

        Of those that claim it at once, the first one reads it through, once.

        Raises:
            ShardError: If what is fetched is not the file that the manifest tells of.
            FileNotFoundError: If the data set lacks it.
        """
        copy = copy_name(name, info)
        with self._leases.exclusive(_making(copy)):
            mapped = self._map_verified(copy, info)
            if mapped is None:
                self._fetch(name, copy, info)
                mapped = map_file(self._path(copy))
            self._leases.create_shared(copy)
        self._seen.add(copy)
        return mapped

    def release(self, copy: str) -> None:
        """Give up the claim on a copy, which is no longer mapped here."""
        # Last used now, as all that share the folder see.
        with contextlib.suppress(FileNotFoundError):
            os.utime(self._path(copy))
        self._leases.drop(copy)

    def remove(self, copy: str) -> bool:
        """Remove a copy, and what is left of fetching it, unless it is claimed; say whether."""
        with self._leases.try_exclusive(_making(copy), copy) as is_free:
            if is_free:
                for path in (self._path(copy), self._scratch(copy)):
                    path.unlink(missing_ok=True)
        return is_free

    def tar_sizes(self) -> Counter[str]:
        """Bytes of the copy of each tar, whole or cut, of whatever data set."""
        sizes: Counter[str] = Counter()
        for entry in os.scandir(self._folder):
            name = entry.name.removesuffix(storage.TEMPORARY_SUFFIX).removeprefix(".")
            if name.endswith(_TAR_SUFFIX):
                with contextlib.suppress(FileNotFoundError):
                    sizes[name] += entry.stat().st_size
        return sizes

    def last_use_ns(self, copy: str) -> int:
        """Give the time when a copy was last mapped or let go; 0 for what is left of a fetch."""
        try:
            return self._path(copy).stat().st_mtime_ns
        except FileNotFoundError:
            return 0

    def _map_verified(self, copy: str, info: FileInfo) -> Any | None:
        path = self._path(copy)
        try:
            if path.stat().st_size != info.size_bytes:
                return None
            os.utime(path)
            mapped = map_file(path)
        except FileNotFoundError:
            return None
        # What another has mapped was looked at by whoever mapped it first.
        is_sound = copy in self._seen or self._leases.is_held(copy)
        return mapped if is_sound or hashlib.sha256(mapped).hexdigest() == info.sha256 else None

    def _fetch(self, name: str, copy: str, info: FileInfo) -> None:
        # One name for all attempts: what a killed one left is written over, or makes room.
        scratch = self._scratch(copy)
        scratch.parent.mkdir(parents=True, exist_ok=True)
        try:
            storage.download(storage.join(self._url, name), scratch)
            with scratch.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != info.sha256:
                    raise ShardError(f"{name} was fetched with another sha256 than the manifest's")
            # Not flushed: what a power failure leaves of it is noticed by whoever maps it next.
            scratch.replace(self._path(copy))
        finally:
            scratch.unlink(missing_ok=True)

    def _path(self, copy: str) -> Path:
        # All indexes stay: beside the tars they would be looked through whenever those make room.
        folder = self._folder / _INDEX_FOLDER if copy.endswith(_INDEX_SUFFIX) else self._folder
        return folder / copy

    def _scratch(self, copy: str) -> Path:
        return self._path(copy).with_name(f".{copy}{storage.TEMPORARY_SUFFIX}")


def copy_name(name: str, info: FileInfo) -> str:
    """Name the copy of a shard's tar or index by its content."""
    suffix = _TAR_SUFFIX if name.endswith(".tar") else _INDEX_SUFFIX
    return f"{name.partition('.')[0]}.{info.sha256[:16]}{suffix}"


def _making(copy: str) -> str:
    """Name the claim of who looks at a copy, fetches it or removes it."""
    return f"{copy} being made"
