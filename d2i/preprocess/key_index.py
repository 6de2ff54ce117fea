"""Where keys are among very many: found without a look at all of them each time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class KeyIndex:
    """The places of keys in a sequence that holds them: 16 bytes each, beside the sequence.

    Args:
        keys: Each at most once; read through at once, and one at a time later.
    """

    def __init__(self, keys: Sequence[str]) -> None:
        self._keys = keys
        hashes = np.fromiter(map(hash, keys), np.int64, len(keys))
        self._order = np.argsort(hashes)
        self._hashes = hashes[self._order]

    def find(self, key: str) -> int | None:
        """Return the place of a key, or None where it is not there."""
        wanted = hash(key)
        first = np.searchsorted(self._hashes, wanted)
        stop = np.searchsorted(self._hashes, wanted, side="right")
        places = self._order[first:stop].tolist()
        return next((place for place in places if self._keys[place] == key), None)
