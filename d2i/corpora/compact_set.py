"""Which hashes were seen before, of very many."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

MAX_RECENT = 1 << 22
"""More than MMDialog has dialogs, so that these are in a plain set alone; about 300 MB (ours)."""


class CompactHashSet:
    """A set of 64-bit hashes, of which all but the last ones added take 8 bytes each."""

    def __init__(self) -> None:
        self._recent: set[int] = set()
        self._sorted: NDArray[np.int64] = np.empty(0, np.int64)

    def __contains__(self, number: int) -> bool:
        """Say whether a hash was added."""
        if number in self._recent:
            return True
        if not len(self._sorted):
            return False
        place = int(np.searchsorted(self._sorted, number))
        return place < len(self._sorted) and bool(self._sorted[place] == number)

    def add(self, number: int) -> None:
        """Add a hash, as Python's `hash` gives it."""
        self._recent.add(number)
        if len(self._recent) >= MAX_RECENT:
            recent = np.fromiter(self._recent, np.int64, len(self._recent))
            self._recent.clear()
            recent.sort()
            # Of two sorted runs this is a merge.
            self._sorted = np.concatenate([self._sorted, recent])
            self._sorted.sort(kind="stable")
