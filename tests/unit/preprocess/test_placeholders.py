"""Placeholders across the shards of a split, found in bounded memory and committed shards only."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from d2i.preprocess.ledger import LedgerRow, write_ledger
from d2i.preprocess.placeholders import placeholders_of, plan_retractions
from d2i.preprocess.plan import hash_partition
from tests.arrow import own_pool

NUM_SHARDS, NUM_ROWS, NUM_SAME = 30, 400, 10


def sha256(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def row(shard: int, number: int, content: str, *, url: str | None = None) -> LedgerRow:
    name = f"{shard}-{number}"
    return LedgerRow(
        key=f"train-{name}-1-0",
        image=url or f"http://a.example/{name}",
        status="ok",
        reason="ok",
        detail="",
        attempts=1,
        http_status=200,
        final_url=f"http://b.example/{'long' * 20}/{name}",
        size_bytes=1,
        width=1,
        height=1,
        sha256=sha256(content),
        time_s=0.0,
    )


def commit(directory: Path, index: int) -> None:
    """Mark a shard as committed; only the name of the file counts."""
    (directory / f"{index:06d}-{'a' * 16}.commit.json").write_bytes(b"")


def test_placeholder_across_shards_is_found_in_bounded_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_bytes = 0
    for shard in range(NUM_SHARDS):
        own = [row(shard, n, f"{shard}-{n}") for n in range(NUM_ROWS)]
        # One URL shared by ten instances counts as one URL.
        repeated = [row(shard, NUM_ROWS + n, "twin", url="http://a/twin") for n in range(NUM_SAME)]
        shared = [row(shard, 500, "gone" if shard < NUM_SAME else f"gone {shard % 3}")]
        write_ledger(str(tmp_path), shard, [*own, *repeated, *shared])
        commit(tmp_path, shard)
        num_bytes += sum(len(r.sha256 or "") + len(r.image) for r in own)
    monkeypatch.setattr(hash_partition, "MAX_WAITING_BYTES", 1 << 16)
    with own_pool() as pool:
        assert placeholders_of(str(tmp_path), NUM_SAME) == {sha256("gone")}
    assert pool.max_memory() < num_bytes / 2
    assert placeholders_of(str(tmp_path), 0) == frozenset()


def test_placeholders_ignore_uncommitted_shards(tmp_path: Path) -> None:
    write_ledger(str(tmp_path), 0, [row(0, n, "gone") for n in range(NUM_SAME)])
    assert placeholders_of(str(tmp_path), NUM_SAME) == frozenset()
    assert plan_retractions(str(tmp_path), NUM_SAME) == []
    # A supplement whose rows were merged into other shards has a commit record, but no ledger.
    commit(tmp_path, 1)
    assert placeholders_of(str(tmp_path), NUM_SAME) == frozenset()
    write_ledger(str(tmp_path), 1, [])
    assert placeholders_of(str(tmp_path), NUM_SAME) == frozenset()
    commit(tmp_path, 0)
    assert placeholders_of(str(tmp_path), NUM_SAME) == {sha256("gone")}
