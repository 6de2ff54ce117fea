"""Local copies of a data set's files, in a directory shared by processes, data sets and jobs.

A process that maps a copy finds it verified or absent. Must not import torch or ray.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections import Counter
from pathlib import Path
from typing import Any

from d2i.errors import ConfigError, ShardError
from d2i.io import storage
from d2i.shards.cache.file_leases import FileLeases
from d2i.shards.cache.mmap_shards import map_file
from d2i.shards.commit import FileInfo

_CLAIMS_NAME = ".d2i-claims"
# Other files in the directory are not ours: a data set's own files have other suffixes.
_TAR_SUFFIX = ".d2i-tar"
_INDEX_SUFFIX = ".d2i-index"
_INDEX_DIRECTORY = "indexes"


class LocalCopies:
    """Copies of the files of one data set, beside those of others.

    A copy is named by its content. Two leases protect it. One is shared by all that have the copy
    mapped, and prevents its eviction. The other is held exclusively to verify the copy, fetch it or
    remove it; its holder never waits, so that there is no deadlock. If a copy is gone or invalid,
    its holder puts a new file in its place, and what is already mapped stays.

    Args:
        url: The data set's directory.
        directory: The directory of the copies, on a local disk; created if absent.

    Raises:
        ConfigError: If this user cannot keep copies there.
    """

    def __init__(self, url: str, directory: Path) -> None:
        self._url, self._directory = url, directory
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._leases = FileLeases(directory / _CLAIMS_NAME)
        except OSError as err:
            raise ConfigError(
                f"cannot cache shards in {directory} ({err.strerror}); expected a directory "
                "that you can write to, or none yet; choose another --cache-dir"
            ) from err
        # Copies that this object verified once: any later file of that name was when fetched.
        self._seen: set[str] = set()

    def map(self, name: str, info: FileInfo) -> Any:
        """Map a file's copy, fetched if there is no valid one, and lease it until `release`.

        Of all that map it at the same time, only the first reads it whole to verify it.

        Raises:
            ShardError: If the fetched file does not match its recorded sha256.
            FileNotFoundError: If the data set lacks it.
        """
        copy = copy_name(name, info)
        with self._leases.exclusive(_making(copy)):
            mapped = self._map_verified(copy, info)
            if mapped is None:
                self._fetch(name, copy, info)
                mapped = map_file(self._path(copy))
            self._leases.shared(copy)
        self._seen.add(copy)
        return mapped

    def release(self, copy: str) -> None:
        """Release the lease on a copy that is no longer mapped here."""
        # The time of last use, visible to all that share the directory.
        with contextlib.suppress(FileNotFoundError):
            os.utime(self._path(copy))
        self._leases.drop(copy)

    def remove(self, copy: str) -> bool:
        """Remove a copy and any partial download of it, unless leased; return True if free."""
        with self._leases.try_exclusive(_making(copy), copy) as is_free:
            if is_free:
                for path in (self._path(copy), self._scratch(copy)):
                    path.unlink(missing_ok=True)
        return is_free

    def tar_sizes(self) -> Counter[str]:
        """Return the size in bytes of each tar's copy, whole or partial, of all data sets."""
        sizes: Counter[str] = Counter()
        for entry in os.scandir(self._directory):
            name = entry.name.removesuffix(storage.TEMPORARY_SUFFIX).removeprefix(".")
            if name.endswith(_TAR_SUFFIX):
                with contextlib.suppress(FileNotFoundError):
                    sizes[name] += entry.stat().st_size
        return sizes

    def last_use_ns(self, copy: str) -> int:
        """Return the time when a copy was last mapped or released; 0 for a partial download."""
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
        # A copy that others have mapped was verified by the first of them.
        is_sound = copy in self._seen or self._leases.is_held(copy)
        return mapped if is_sound or hashlib.sha256(mapped).hexdigest() == info.sha256 else None

    def _fetch(self, name: str, copy: str, info: FileInfo) -> None:
        # One name for all attempts: what a killed one left is overwritten, or evicted.
        scratch = self._scratch(copy)
        scratch.parent.mkdir(parents=True, exist_ok=True)
        try:
            storage.download(storage.join(self._url, name), scratch)
            with scratch.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != info.sha256:
                    raise ShardError(
                        f"{name}, as fetched, does not match the sha256 recorded of it"
                    )
            # No fsync: damage by a power failure is found when the copy is mapped next.
            scratch.replace(self._path(copy))
        finally:
            scratch.unlink(missing_ok=True)

    def _path(self, copy: str) -> Path:
        # Indexes are never evicted: beside the tars, each eviction would list them as well.
        directory = (
            self._directory / _INDEX_DIRECTORY if copy.endswith(_INDEX_SUFFIX) else self._directory
        )
        return directory / copy

    def _scratch(self, copy: str) -> Path:
        return self._path(copy).with_name(f".{copy}{storage.TEMPORARY_SUFFIX}")


def copy_name(name: str, info: FileInfo) -> str:
    """Return the name of the copy of a shard's tar or index, from its content."""
    suffix = _TAR_SUFFIX if name.endswith(".tar") else _INDEX_SUFFIX
    own = name.rpartition("/")[2].partition(".")[0]
    return f"{own}.{info.sha256[:16]}{suffix}"


def _making(copy: str) -> str:
    """Return the name of the lease for verifying a copy, fetching it or removing it."""
    return f"{copy} being made"
