"""Cache of remote shards in local copies: bounded, prefetched, shared by processes.

Must not import torch or ray.
"""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from d2i.errors import ConfigError, D2IError
from d2i.shards.cache.local_copies import LocalCopies, copy_name
from d2i.shards.cache.mmap_shards import (
    MappedShard,
    ShardRecord,
    decode_index,
    max_mapped_shards,
    open_shard,
    wrap_errors,
)
from d2i.shards.index import Index

_NUM_FETCHERS = 4


@dataclass
class _Held:
    """A mapped copy, and the number of threads that read it now."""

    shard: MappedShard
    num_users: int


class CachedShards:
    """The shards of a remote data set, through a directory of local copies.

    To make room for a shard, whole tars are evicted, least recently used first. Tars in the
    prefetch window go last, the one needed latest first; a shard that is itself only prefetched
    never evicts one that is needed before it. A tar that a thread reads or another process holds is
    never evicted: rather than wait, the cache exceeds its bound until the next shard is opened. It
    may also exceed it while several processes fetch at once, by what the others are fetching.
    Indexes are always kept; they take about a hundredth of the space of their tars.

    A shard is mapped, and leased against eviction, while it is read or in the prefetch window. In
    an unbounded cache it stays so from then on, up to the limit on maps per process.

    Args:
        url: The data set's directory.
        commits: The commit records of its shards.
        directory: The directory of the copies, on a local disk; created if absent.
        max_gb: Upper bound on all tars in the directory, in 1e9 bytes; `None` keeps all.
        check_data: Compare each array with its checksum when it is first read.

    Raises:
        ConfigError: If the largest shard alone exceeds the bound, or nothing can be stored there.
    """

    def __init__(
        self,
        url: str,
        commits: Sequence[ShardRecord],
        directory: Path,
        max_gb: float | None,
        *,
        check_data: bool = True,
    ) -> None:
        _check_bound(url, commits, max_gb)
        self._url, self._commits, self._check_data = url, commits, check_data
        self._max_bytes = None if max_gb is None else int(max_gb * 1e9)
        self._copies = LocalCopies(url, directory)
        self._names = [copy_name(commit.tar_name, commit.tar) for commit in commits]
        self._numbers = {name: number for number, name in enumerate(self._names)}
        self._max_mapped = max_mapped_shards()
        # In the order in which they were opened.
        self._indexes: dict[int, Index] = {}
        self._index_lock = threading.Lock()
        # Guards everything below.
        self._changed = threading.Condition()
        self._held: dict[int, _Held] = {}
        self._pending: set[int] = set()
        # Position in the prefetch window by shard number, in the order of need.
        self._wanted: dict[int, int] = {}
        self._num_fetchers = 0

    def index(self, number: int) -> Index:
        """Return the index of a shard, fetched without its tar."""
        index = self._indexes.get(number)
        if index is None:
            with self._index_lock:
                index = self._indexes.get(number) or self._open_index(self._commits[number])
                while len(self._indexes) >= self._max_mapped:
                    del self._indexes[next(iter(self._indexes))]
                self._indexes[number] = index
        return index

    @contextmanager
    def using(self, number: int) -> Iterator[MappedShard]:
        """Yield a shard, fetched if needed, that is not evicted inside the context."""
        held = self._take(number)
        try:
            yield held.shard
        finally:
            with self._changed:
                held.num_users -= 1
                self._evict_if_idle(number)

    def prefetch(self, numbers: Sequence[int]) -> None:
        """Fetch shards in the background, first one first; replaces the previous prefetch window.

        A failed fetch is left to the reader of that shard, which gets the error; the next call
        retries it. The window holds at most as many shards as may be mapped.
        """
        first = islice(dict.fromkeys(numbers), self._max_mapped)
        wanted = {number: place for place, number in enumerate(first)}
        with self._changed:
            if wanted != self._wanted:
                self._wanted = wanted
                for number in list(self._held):
                    self._evict_if_idle(number)
            num_missing = len(wanted.keys() - self._held.keys() - self._pending)
            num_started = max(0, min(num_missing, _NUM_FETCHERS - self._num_fetchers))
            self._num_fetchers += num_started
        for _ in range(num_started):
            # A daemon, so that a finished process does not wait for shards nobody will read.
            threading.Thread(target=self._fetch_wanted, name="shard-fetcher", daemon=True).start()

    def _fetch_wanted(self) -> None:
        while (number := self._next_wanted()) is not None:
            try:
                self._open(number, num_users=0)
            except (D2IError, OSError):
                with self._changed:
                    self._num_fetchers -= 1
                return

    def _next_wanted(self) -> int | None:
        """Mark the next wanted shard that fits as pending; else count one fetcher less."""
        with self._changed:
            for number in self._wanted:
                if number not in self._held and number not in self._pending:
                    self._pending.add(number)
                    if self._make_room(ahead=number):
                        return number
                    self._pending.discard(number)
                    break
            self._num_fetchers -= 1
        return None

    def _take(self, number: int) -> _Held:
        with self._changed:
            self._changed.wait_for(lambda: number not in self._pending)
            held = self._held.get(number)
            if held is not None:
                held.num_users += 1
                return held
            self._pending.add(number)
            self._make_room()
        return self._open(number, num_users=1)

    def _open(self, number: int, *, num_users: int) -> _Held:
        """Map a shard that this thread has marked as pending."""
        commit, held = self._commits[number], None
        try:
            index = self.index(number)
            with wrap_errors(self._url, commit):
                tar = self._copies.map(commit.tar_name, commit.tar)
                shard = open_shard(commit, tar, index, check_data=self._check_data)
            held = _Held(shard, num_users)
        finally:
            with self._changed:
                self._pending.discard(number)
                if held is None:
                    self._copies.release(self._names[number])
                else:
                    self._held[number] = held
                    self._evict_if_idle(number)
                    self._evict_over_limit()
                self._changed.notify_all()
        return held

    def _evict_if_idle(self, number: int) -> None:
        """Let others evict a shard that is neither read nor wanted here, if there is a bound."""
        held = self._held[number]
        if self._max_bytes is not None and not held.num_users and number not in self._wanted:
            self._evict(number)

    def _evict_over_limit(self) -> None:
        """Unmap idle shards, those opened longest ago first, if too many are mapped."""
        surplus = max(0, len(self._held) - self._max_mapped)
        idle = (
            number
            for number, held in self._held.items()
            if not held.num_users and number not in self._wanted
        )
        for number in list(islice(idle, surplus)):
            self._evict(number)

    def _evict(self, number: int) -> None:
        # Unmap first: a removed file keeps its disk space while it is mapped.
        del self._held[number]
        self._copies.release(self._names[number])

    def _open_index(self, commit: ShardRecord) -> Index:
        with wrap_errors(self._url, commit):
            try:
                mapped = self._copies.map(commit.index_name, commit.index_file)
            finally:
                # Indexes are never removed.
                self._copies.release(copy_name(commit.index_name, commit.index_file))
            return decode_index(commit, mapped)

    def _make_room(self, ahead: int | None = None) -> bool:
        """Evict copies until all that are here or being fetched fit; return whether they do.

        Args:
            ahead: The pending shard that needs the room, if it is only prefetched.
        """
        if self._max_bytes is None:
            return True
        sizes = self._copies.tar_sizes()
        for number in self._pending:
            sizes[self._names[number]] = self._commits[number].tar.size_bytes
        excess = sum(sizes.values()) - self._max_bytes
        for name in self._victims(sizes, ahead) if excess > 0 else ():
            if excess <= 0:
                break
            if self._remove(name):
                excess -= sizes[name]
        return excess <= 0

    def _victims(self, names: Counter[str], ahead: int | None) -> list[str]:
        """Return the copies that may be evicted, in the order of eviction."""
        places = {self._names[number]: place for number, place in self._wanted.items()}
        first_free = -1 if ahead is None else places[self._names[ahead]]
        unwanted = [name for name in names if name not in places]
        later = [name for name in names if places.get(name, -1) > first_free]
        return [
            *sorted(unwanted, key=self._copies.last_use_ns),
            *sorted(later, key=lambda name: -places[name]),
        ]

    def _remove(self, name: str) -> bool:
        """Evict the copy of a tar, unless in use here or elsewhere; return True if evicted."""
        number = self._numbers.get(name, -1)
        held = self._held.get(number)
        if number in self._pending or (held is not None and held.num_users):
            return False
        if held is not None:
            self._evict(number)
        return self._copies.remove(name)


def _check_bound(url: str, commits: Sequence[ShardRecord], max_gb: float | None) -> None:
    if max_gb is None:
        return
    largest = max((commit.tar.size_bytes for commit in commits), default=0)
    if not math.isfinite(max_gb):
        raise ConfigError(
            f"a cache of {max_gb} GB; expected a finite size; leave it out for no limit"
        )
    if int(max_gb * 1e9) < largest:
        raise ConfigError(
            f"a cache of {max_gb:g} GB is too small for {url}, whose largest shard has "
            f"{largest / 1e9:g} GB; expected several shards to fit; raise --cache-gb"
        )
