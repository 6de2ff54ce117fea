"""The order of asking: no host's addresses in a row, and the same for the same pictures."""

from __future__ import annotations

import itertools
import random

from hypothesis import given
from hypothesis import strategies as st

from d2i.dialog import ImageRef
from d2i.preprocess.fetch.interleave_hosts import interleave_by_host


def refs(host: str, num: int) -> list[ImageRef]:
    return [ImageRef("urls", (f"http://{host}/{n}",)) for n in range(num)]


def test_a_small_host_is_asked_all_along() -> None:
    ordered = interleave_by_host([*refs("small", 10), *refs("great", 990)])
    places = [n for n, ref in enumerate(ordered) if "small" in ref.value[0]]
    assert all(80 < right - left < 120 for left, right in itertools.pairwise(places))


@given(st.lists(st.text(max_size=30), unique=True), st.randoms())
def test_every_picture_has_one_place_whatever_the_order_before(
    urls: list[str], draws: random.Random
) -> None:
    given_refs = [ImageRef("urls", (url,)) for url in urls]
    ordered = interleave_by_host(given_refs)
    assert sorted(ref.value for ref in ordered) == sorted((url,) for url in urls)
    draws.shuffle(given_refs)
    assert interleave_by_host(given_refs) == ordered
