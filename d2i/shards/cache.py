"""Local copies of shards that lie elsewhere: bounded, fetched ahead, shared by processes.

A copy is whole or absent under its name, which says its content: one folder serves any number of
data sets. Must not import torch or ray.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from d2i import storage
from d2i.errors import ConfigError, D2IError, ShardError
from d2i.shards.claims import Claims
from d2i.shards.commit import Commit, FileInfo
from d2i.shards.index import Index
from d2i.shards.mapped import MappedShard, in_words, map_file, open_index, open_shard

_NUM_FETCHERS = 4
_CLAIMS_NAME = ".d2i-claims"


@dataclass
class _Held:
    """A mapped copy, how many threads read it now, and when one last began to."""

    shard: MappedShard
    num_users: int
    used_ns: int


class CachedShards:
    """The shards of a data set that is not local, through a folder of copies.

    Room for a shard is made by removing the tars that were used longest ago; those that are wanted
    soon (`prefetch`) go last, the latest first, and for a shard that is only wanted itself none
    that is wanted before it. Nothing goes that a thread reads or another process holds: the bound
    is passed, until the next shard is opened, rather than waited for. Indexes are always kept;
    they take about a hundredth of their tars.

    Args:
        url: The data set's folder.
        commits: Its shards.
        folder: Where the copies lie, on a disk of this machine; made where it is not there.
        max_bytes: The most that tars in the folder may take together; `None` keeps all.

    Raises:
        ConfigError: If the largest shard alone would take more.
    """

    def __init__(
        self, url: str, commits: Sequence[Commit], folder: Path, max_bytes: int | None
    ) -> None:
        _check_bound(url, commits, max_bytes)
        folder.mkdir(parents=True, exist_ok=True)
        self._url, self._commits, self._folder = url, commits, folder
        self._max_bytes = max_bytes
        self._claims = Claims(folder / _CLAIMS_NAME)
        self._numbers = {commit.tar_name: number for number, commit in enumerate(commits)}
        self._indexes: dict[int, Index] = {}
        self._index_lock = threading.Lock()
        # Guards all below.
        self._changed = threading.Condition()
        self._held: dict[int, _Held] = {}
        self._pending: set[int] = set()
        self._wanted: tuple[int, ...] = ()
        self._num_fetchers = 0

    def index(self, number: int) -> Index:
        """Give the index of a shard, fetched without its tar."""
        index = self._indexes.get(number)
        if index is None:
            with self._index_lock:
                index = self._indexes.get(number) or self._open_index(self._commits[number])
                self._indexes[number] = index
        return index

    @contextmanager
    def using(self, number: int) -> Iterator[MappedShard]:
        """Give a shard, fetched if need be, that is not removed until it is left."""
        held = self._take(number)
        try:
            yield held.shard
        finally:
            with self._changed:
                held.num_users -= 1

    def prefetch(self, numbers: Sequence[int]) -> None:
        """Fetch shards in the background, the first one first, in place of those wanted before.

        What fails is left to whoever reads the shard, and gets the error.
        """
        wanted = tuple(numbers)
        with self._changed:
            if wanted == self._wanted:
                return
            self._wanted = wanted
            num_started = _NUM_FETCHERS - self._num_fetchers
            self._num_fetchers = _NUM_FETCHERS
        for _ in range(num_started):
            # A daemon: a process that is done does not wait for shards that nobody will read.
            threading.Thread(target=self._fetch_wanted, name="shard-fetcher", daemon=True).start()

    def _fetch_wanted(self) -> None:
        try:
            while (number := self._next_wanted()) is not None:
                self._open(number, num_users=0)
        except (D2IError, OSError):
            return
        finally:
            with self._changed:
                self._num_fetchers -= 1

    def _next_wanted(self) -> int | None:
        """Claim the next shard to be fetched, if one is wanted for which there is room."""
        with self._changed:
            for number in self._wanted:
                if number not in self._held and number not in self._pending:
                    self._pending.add(number)
                    if self._make_room(ahead=number):
                        return number
                    self._pending.discard(number)
                    return None
        return None

    def _take(self, number: int) -> _Held:
        with self._changed:
            self._changed.wait_for(lambda: number not in self._pending)
            held = self._held.get(number)
            if held is not None:
                held.num_users += 1
                held.used_ns = time.time_ns()
                return held
            self._pending.add(number)
            self._make_room()
        return self._open(number, num_users=1)

    def _open(self, number: int, *, num_users: int) -> _Held:
        """Map a shard that this thread made pending."""
        commit, held = self._commits[number], None
        try:
            index = self.index(number)
            with in_words(self._url, commit):
                shard = open_shard(commit, map_file(self._copy(commit.tar_name, commit.tar)), index)
            held = _Held(shard, num_users, time.time_ns())
        finally:
            with self._changed:
                self._pending.discard(number)
                if held is None:
                    self._claims.drop(commit.tar_name)
                else:
                    self._held[number] = held
                self._changed.notify_all()
        return held

    def _open_index(self, commit: Commit) -> Index:
        with in_words(self._url, commit):
            try:
                path = self._copy(commit.index_name, commit.index_file)
            finally:
                # Indexes are never removed.
                self._claims.drop(commit.index_name)
            return open_index(commit, map_file(path))

    def _copy(self, name: str, info: FileInfo) -> Path:
        """Give the path of a file's copy, under a shared claim; one process fetches it."""
        path = self._folder / name
        self._claims.share(name)
        if not _is_whole(path, info):
            self._claims.own(name)
            if not _is_whole(path, info):
                self._fetch(name, info, path)
            self._claims.share(name)
        os.utime(path)
        return path

    def _fetch(self, name: str, info: FileInfo, path: Path) -> None:
        # One name for all attempts: what a killed one left is written over, or makes room.
        scratch = path.with_name(f".{name}{storage.TEMPORARY_SUFFIX}")
        try:
            storage.download(storage.join(self._url, name), scratch)
            with scratch.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != info.sha256:
                    raise ShardError(f"{name} was fetched with another sha256 than the manifest's")
            storage.publish_file(scratch, str(path))
        finally:
            scratch.unlink(missing_ok=True)

    def _make_room(self, ahead: int | None = None) -> bool:
        """Remove copies until all that is there or on its way fits; say whether it does.

        Args:
            ahead: The pending shard that makes it necessary, if it is only wanted.
        """
        if self._max_bytes is None:
            return True
        sizes = self._sizes()
        excess = sum(sizes.values()) - self._max_bytes
        for name in self._victims(sizes, ahead) if excess > 0 else ():
            if excess <= 0:
                break
            if self._remove(name):
                excess -= sizes[name]
        return excess <= 0

    def _sizes(self) -> Counter[str]:
        """Bytes of each tar in the folder, whole or cut, and of those this process awaits."""
        sizes: Counter[str] = Counter()
        for entry in os.scandir(self._folder):
            name = entry.name.removesuffix(storage.TEMPORARY_SUFFIX).removeprefix(".")
            if name.endswith(".tar"):
                with contextlib.suppress(FileNotFoundError):
                    sizes[name] += entry.stat().st_size
        for number in self._pending:
            sizes[self._commits[number].tar_name] = self._commits[number].tar.size_bytes
        return sizes

    def _victims(self, names: Counter[str], ahead: int | None) -> list[str]:
        """What may be removed, in the order in which it should be."""
        places = {self._commits[n].tar_name: place for place, n in enumerate(self._wanted)}
        first_free = -1 if ahead is None else places[self._commits[ahead].tar_name]
        unwanted = [name for name in names if name not in places]
        later = [name for name in names if places.get(name, -1) > first_free]
        return [
            *sorted(unwanted, key=self._last_use),
            *sorted(later, key=lambda name: -places[name]),
        ]

    def _last_use(self, name: str) -> int:
        held = self._held.get(self._numbers.get(name, -1))
        if held is not None:
            return held.used_ns
        try:
            return (self._folder / name).stat().st_mtime_ns
        except FileNotFoundError:
            return 0

    def _remove(self, name: str) -> bool:
        """Remove a tar, and what is left of fetching it, unless it is in use; say whether."""
        number = self._numbers.get(name, -1)
        held = self._held.get(number)
        if number in self._pending or (held is not None and held.num_users):
            return False
        self._held.pop(number, None)
        is_free = self._claims.try_own(name)
        if is_free:
            path = self._folder / name
            path.unlink(missing_ok=True)
            path.with_name(f".{name}{storage.TEMPORARY_SUFFIX}").unlink(missing_ok=True)
        self._claims.drop(name)
        return is_free


def _check_bound(url: str, commits: Sequence[Commit], max_bytes: int | None) -> None:
    largest = max((commit.tar.size_bytes for commit in commits), default=0)
    if max_bytes is not None and max_bytes < largest:
        raise ConfigError(
            f"a cache of {max_bytes / 1e9:g} GB is too small for {url}, whose largest shard has "
            f"{largest / 1e9:g} GB; expected several shards to fit; give it more"
        )


def _is_whole(path: Path, info: FileInfo) -> bool:
    try:
        return path.stat().st_size == info.size_bytes
    except FileNotFoundError:
        return False
