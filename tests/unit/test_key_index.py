"""Keys are found where they are, also where hashes are the same."""

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
def test_keys_are_found_where_they_are(hashed: object, keys: list[str], asked: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(key_index, "hash", hashed, raising=False)
        places = KeyIndex(keys)
        assert [places.find(key) for key in keys] == list(range(len(keys)))
        assert places.find(asked) == (keys.index(asked) if asked in keys else None)
