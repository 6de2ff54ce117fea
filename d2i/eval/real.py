"""Features of true pictures, kept in the user's cache by the fingerprint of all that decides them.

Each machine has its own copy; a machine without one measures anew and gets the same numbers. Must
not import torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from d2i import storage

NAMES = ("real_features", "real_embeddings")
_DESCRIBED = "described.json"


class RealFeatures:
    """The cached features of one data set under one fingerprint.

    Args:
        described: What decides them, as JSON values.
    """

    def __init__(self, described: Mapping[str, Any]) -> None:
        self._described = json.dumps(described, sort_keys=True)
        self._folder = storage.cache_folder(f"real features {self._described}")

    def read(self, indices: Sequence[int]) -> dict[str, NDArray[Any]] | None:
        """Return `real_features` and `real_embeddings` of instances, or None if not kept."""
        if self._kept is None:
            return None
        return {name: array[np.asarray(indices)] for name, array in self._kept.items()}

    def keep(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Keep the features of all instances, in the order of the data set."""
        if self._kept is not None:
            return
        for name in NAMES:
            url = str(self._folder / f"{name}.npy")
            with storage.new_file(url) as path, path.open("wb") as file:
                np.save(file, arrays[name], allow_pickle=False)
        # Written last: without it nothing is kept.
        storage.write_bytes(str(self._folder / _DESCRIBED), self._described.encode())

    @cached_property
    def _kept(self) -> dict[str, NDArray[Any]] | None:
        path = self._folder / _DESCRIBED
        if not path.is_file() or path.read_text() != self._described:
            return None
        # Mapped, so that all workers of a machine share one copy in memory.
        return {
            name: np.load(self._folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
            for name in NAMES
        }
