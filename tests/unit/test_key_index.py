"""KeyIndex finds the position of every key, also when hashes collide."""

from __future__ import annotations

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2i.preprocess import key_index
from d2i.preprocess.key_index import KeyIndex

LARGEST = 2 ** (sys.hash_info.width - 1) - 1


@pytest.mark.parametrize("hashed", [hash, len, lambda key: LARGEST - len(key) % 2])
@given(keys=st.lists(st.text("abc", max_size=3), unique=True), asked=st.text("abc", max_size=3))
def test_key_index_finds_keys_despite_hash_collisions(
    hashed: object, keys: list[str], asked: str
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(key_index, "hash", hashed, raising=False)
        index = KeyIndex(keys)
        assert [index.find(key) for key in keys] == list(range(len(keys)))
        assert index.find(asked) == (keys.index(asked) if asked in keys else None)
