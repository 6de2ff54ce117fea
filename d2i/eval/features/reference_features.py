"""Cache of reference image features, keyed by a fingerprint of everything that they depend on.

Each machine has its own copy, in the user's cache directory. A machine without one computes the
features again and gets the same numbers. Must not import torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from d2i.errors import DataError
from d2i.io import storage
from d2i.io.checksums import file_sha256
from d2i.io.parse import parse_json

NAMES = ("real_features", "real_embeddings")
_DESCRIBED = "described.json"


class ReferenceFeatures:
    """The cached features of one data set under one fingerprint, verified by sha256.

    Args:
        described: Everything that they depend on, as JSON values.
    """

    def __init__(self, described: Mapping[str, Any]) -> None:
        self._described = json.dumps(described, sort_keys=True)
        self._directory = storage.cache_directory(f"real features {self._described}")

    def read(self, indices: Sequence[int]) -> dict[str, NDArray[Any]] | None:
        """Return `real_features` and `real_embeddings` of instances, or None if not cached."""
        if self._kept is None:
            return None
        return {name: array[np.asarray(indices)] for name, array in self._kept.items()}

    def keep(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Cache the features of all instances, in the order of the data set."""
        if self._kept is not None:
            return
        sums = {}
        for name in NAMES:
            url = str(self._directory / f"{name}.npy")
            with storage.new_file(url) as path:
                with path.open("wb") as file:
                    np.save(file, arrays[name], allow_pickle=False)
                sums[name] = file_sha256(str(path))
        # Written last: without it the features do not count as cached.
        stored = json.dumps({"described": self._described, "sha256": sums})
        storage.write_bytes(str(self._directory / _DESCRIBED), stored.encode())

    @cached_property
    def _kept(self) -> dict[str, NDArray[Any]] | None:
        """The cached features; None if any of them is missing or damaged."""
        try:
            stored = parse_json(storage.read_bytes(str(self._directory / _DESCRIBED)), _DESCRIBED)
            if stored.get("described") != self._described:
                return None
            return {name: self._read_kept(name, stored["sha256"][name]) for name in NAMES}
        except (OSError, DataError, ValueError, LookupError, TypeError):
            return None

    def _read_kept(self, name: str, sha256: str) -> NDArray[Any]:
        """Memory-map an array, so that all workers of a machine share one copy.

        Raises:
            ValueError: If its file has another sha256.
        """
        path = self._directory / f"{name}.npy"
        if file_sha256(str(path)) != sha256:
            raise ValueError(f"{path} does not match the sha256 it was cached with")
        array: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
        return array
