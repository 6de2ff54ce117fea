"""Shards that outlive a fork. Must not import torch or ray."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from d2i.shards.index import Index
from d2i.shards.mmap_shards import MappedShard, Shards


class ForkedShards:
    """Shards that each process opens for itself, be it forked or handed a pickle.

    The locks, claims and fetching threads of a forked child would be its parent's: it would wait
    for threads that it does not have, and read what nothing keeps from being removed.

    Args:
        open_shards: Opens them; pickles.
    """

    def __init__(self, open_shards: Callable[[], Shards]) -> None:
        self._open_shards = open_shards
        self._opened = (os.getpid(), open_shards())

    def __reduce__(self) -> tuple[Any, ...]:
        return ForkedShards, (self._open_shards,)

    def index(self, number: int) -> Index:
        """Give the index of a shard, without its tar."""
        return self._own().index(number)

    def using(self, number: int) -> AbstractContextManager[MappedShard]:
        """Give a shard that stays mapped until it is left."""
        return self._own().using(number)

    def prefetch(self, numbers: Sequence[int]) -> None:
        """Hear which shards are used next, the first one first."""
        self._own().prefetch(numbers)

    def _own(self) -> Shards:
        process, shards = self._opened
        if process != os.getpid():
            # Of threads that come here at once each opens them: any of these does for all.
            shards = self._open_shards()
            self._opened = (os.getpid(), shards)
        return shards
