"""CompactHashSet is exact and takes few bytes per number."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2i.corpora import compact_set
from d2i.corpora.compact_set import CompactHashSet

NUMBERS = st.one_of(st.integers(-3, 3), st.integers(-(2**63), 2**63 - 1))


@given(numbers=st.lists(NUMBERS), max_recent=st.integers(1, 5))
def test_compact_hash_set_matches_builtin_set(numbers: list[int], max_recent: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compact_set, "MAX_RECENT", max_recent)
        known, expected = CompactHashSet(), set[int]()
        for number in numbers:
            assert (number in known) == (number in expected)
            known.add(number)
            expected.add(number)
        assert all(number in known for number in numbers)


def test_compact_hash_set_takes_few_bytes_per_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compact_set, "MAX_RECENT", 1 << 14)
    numbers = np.random.default_rng(0).integers(-(2**63), 2**63 - 1, 300_000).tolist()
    tracemalloc.start()
    try:
        known = CompactHashSet()
        for number in numbers:
            known.add(number)
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 15 * len(numbers)
    assert all(number in known for number in numbers[:1000])
