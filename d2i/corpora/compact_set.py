"""Memory-efficient set of very many hashes, to find duplicates."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

MAX_RECENT = 1 << 22
"""Size of the plain set of recent hashes, about 300 MB: MMDialog has fewer dialogs than that, so
all of its hashes stay in the plain set."""


class CompactHashSet:
    """A set of 64-bit hashes; all but the most recently added take 8 bytes each."""

    def __init__(self) -> None:
        self._recent: set[int] = set()
        self._sorted: NDArray[np.int64] = np.empty(0, np.int64)

    def __contains__(self, number: int) -> bool:
        """Return whether a hash was added."""
        if number in self._recent:
            return True
        if not len(self._sorted):
            return False
        place = int(np.searchsorted(self._sorted, number))
        return place < len(self._sorted) and bool(self._sorted[place] == number)

    def add(self, number: int) -> None:
        """Add a hash, as Python's `hash` returns it."""
        self._recent.add(number)
        if len(self._recent) >= MAX_RECENT:
            recent = np.fromiter(self._recent, np.int64, len(self._recent))
            self._recent.clear()
            recent.sort()
            # A stable sort of two sorted runs is a merge.
            self._sorted = np.concatenate([self._sorted, recent])
            self._sorted.sort(kind="stable")
