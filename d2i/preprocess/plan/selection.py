"""Selection of instances for `--limit`: those with the smallest ranks are kept."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from d2i.dialog import Instance, key_order_digests

Rule = Literal["hash", "reservoir", "first"]
Ranking = Callable[[Sequence[Instance]], NDArray[np.uint64]]
LAST_RANK = 2**64 - 1
_SLACK = 1.05
"""Factor by which the kept ranks may exceed the limit before the largest are dropped."""


class SmallestRankSampler:
    """Ranks instances as they are read, and tracks the largest rank that is still wanted.

    Args:
        limit: Number of instances to keep; None keeps all.
        rule: `hash` ranks by a seeded hash of the key: the same set in any reading order.
            `reservoir` draws random ranks in reading order, `first` counts in reading order.
        seed: Seed of `hash` and `reservoir`.
    """

    def __init__(self, limit: int | None, rule: Rule, seed: int) -> None:
        self.max_rank = LAST_RANK
        self._limit = limit
        self._ranking = _RANKINGS[rule](seed)
        self._kept: list[NDArray[np.uint64]] = []
        self._num_kept = 0

    def rank(self, instances: Sequence[Instance]) -> NDArray[np.uint64]:
        """Return the ranks (N,) of the next instances read."""
        if self._limit is None:
            return np.zeros(len(instances), np.uint64)
        ranks = self._ranking(instances)
        self._kept.append(ranks[ranks <= self.max_rank])
        self._num_kept += len(self._kept[-1])
        if self._num_kept > _SLACK * self._limit:
            self._forget_large_ranks()
        return ranks

    def last_rank(self) -> int:
        """Return the largest selected rank, once all instances are ranked."""
        self._forget_large_ranks()
        return self.max_rank

    def _forget_large_ranks(self) -> None:
        if self._limit is None or self._num_kept <= self._limit:
            return
        smallest = np.partition(np.concatenate(self._kept), self._limit - 1)[: self._limit]
        self._kept, self._num_kept = [smallest], self._limit
        self.max_rank = int(smallest.max())


def _by_hash(seed: int) -> Ranking:
    def rank(instances: Sequence[Instance]) -> NDArray[np.uint64]:
        digests = key_order_digests([instance.key for instance in instances], seed)
        return np.frombuffer(digests, ">u8").astype(np.uint64)

    return rank


def _by_draw(seed: int) -> Ranking:
    dice = np.random.default_rng(seed)
    return lambda instances: dice.integers(0, LAST_RANK, len(instances), np.uint64)


def _by_position(seed: int) -> Ranking:
    del seed
    places = itertools.count()
    return lambda instances: np.fromiter(places, np.uint64, len(instances))


_RANKINGS = {"hash": _by_hash, "reservoir": _by_draw, "first": _by_position}
