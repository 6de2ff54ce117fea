"""The request of a training job."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d2i.config import Recipe
from d2i.shards import ShardReader, split_url


@dataclass(frozen=True)
class TrainRequest:
    """One training job, the same on every rank.

    Args:
        recipe: The settings that determine all numbers.
        data_url: Directory made by d2i preprocess.
        run_url: The run directory, a path or an fsspec URL that all ranks share.
        zero: DeepSpeed's `zero_optimization` settings, in place of the stage alone.
        cache_dir: Local directory to cache remote shards in; by default in the user's cache.
        cache_gb: Size limit of that cache, in 1e9 bytes; no limit by default.
        check_data: Compare each array with its checksum when it is first read.
    """

    recipe: Recipe
    data_url: str
    run_url: str
    zero: Mapping[str, Any] | None = None
    cache_dir: Path | None = None
    cache_gb: float | None = None
    check_data: bool = True

    def open_shards(self, url: str) -> ShardReader:
        """Open a data set through this job's cache.

        Raises:
            ShardError: If it cannot be read.
            ConfigError: If one of its shards does not fit into the cache.
        """
        return ShardReader(
            url, cache_dir=self.cache_dir, cache_gb=self.cache_gb, check_data=self.check_data
        )

    def open_validation(self) -> ShardReader | None:
        """Open the validation split as `open_shards` does; `None` if it is absent or empty."""
        url = split_url(self.data_url, "valid")
        if url is None or not len(reader := self.open_shards(url)):
            return None
        return reader
