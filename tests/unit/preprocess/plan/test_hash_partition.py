"""Hash partitions on disk: all rows come back in ranges of their hash, in bounded memory."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray

from d2i.preprocess.plan import hash_partition
from d2i.preprocess.plan.hash_partition import HashPartitions
from tests.arrow import own_pool

NUM_ROWS = 40_000
TEXT = "t" * 100


def buckets(path: Path, hashes: NDArray[np.uint64]) -> list[NDArray[np.uint64]]:
    with HashPartitions(path, "hash") as rows:
        for part in np.split(hashes, 40):
            rows.add(pa.table({"hash": part, "text": [TEXT] * len(part)}))
    return [piece["hash"].to_numpy() for piece in rows.buckets()]


@pytest.mark.parametrize("common_bits", [0, 5, 20])
def test_hash_partition_returns_ranges_in_bounded_memory(
    common_bits: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_bytes = NUM_ROWS * (len(TEXT) + 12)
    monkeypatch.setattr(hash_partition, "MAX_WAITING_BYTES", num_bytes // 100)
    monkeypatch.setattr(hash_partition, "MAX_BUCKET_BYTES", num_bytes // 100)
    hashes = np.random.default_rng(0).integers(0, 2**63, NUM_ROWS, np.uint64) << np.uint64(1)
    hashes >>= np.uint64(common_bits)
    with own_pool() as pool:
        found = buckets(tmp_path / "rows.arrow", hashes)
    assert pool.max_memory() < num_bytes / 6
    assert max(map(len, found)) < NUM_ROWS / 8
    assert all(a.max() < b.min() for a, b in itertools.pairwise(found))
    assert np.array_equal(np.sort(np.concatenate(found)), np.sort(hashes))
    assert [path.name for path in tmp_path.iterdir()] == ["rows.arrow"]


def test_hash_partition_keeps_rows_of_one_hash_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hash_partition, "MAX_BUCKET_BYTES", 1000)
    monkeypatch.setattr(hash_partition, "MAX_WAITING_BYTES", 1 << 16)
    found = buckets(tmp_path / "rows.arrow", np.full(4000, 2**64 - 1, np.uint64))
    assert list(map(len, found)) == [4000]
