"""KeyIndex finds the position of every key, also when hashes collide."""

from __future__ import annotations

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2i.preprocess import reuse
from d2i.preprocess.reuse import KeyIndex

LARGEST = 2 ** (sys.hash_info.width - 1) - 1


@pytest.mark.parametrize("hash_function", [hash, len, lambda key: LARGEST - len(key) % 2])
@given(keys=st.lists(st.text("abc", max_size=3), unique=True), query=st.text("abc", max_size=3))
def test_key_index_finds_keys_despite_hash_collisions(
    hash_function: object, keys: list[str], query: str
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reuse, "hash", hash_function, raising=False)
        index = KeyIndex(keys)
        assert [index.find(key) for key in keys] == list(range(len(keys)))
        assert index.find(query) == (keys.index(query) if query in keys else None)
