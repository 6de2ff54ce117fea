"""Index of the positions of very many keys, searched without a scan of all of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class KeyIndex:
    """Positions of keys in a sequence; takes 16 bytes per key, beside the sequence itself.

    Args:
        keys: Distinct keys; all are read at the start, and single ones later.
    """

    def __init__(self, keys: Sequence[str]) -> None:
        self._keys = keys
        hashes = np.fromiter(map(hash, keys), np.int64, len(keys))
        self._order = np.argsort(hashes)
        self._hashes = hashes[self._order]

    def find(self, key: str) -> int | None:
        """Return the position of a key, or None if it is absent."""
        wanted = hash(key)
        first = np.searchsorted(self._hashes, wanted)
        stop = np.searchsorted(self._hashes, wanted, side="right")
        places = self._order[first:stop].tolist()
        return next((place for place in places if self._keys[place] == key), None)
