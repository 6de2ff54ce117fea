"""Order of requests: hosts are interleaved, and the same images give the same order."""

from __future__ import annotations

import itertools
import random

from hypothesis import given
from hypothesis import strategies as st

from d2i.dialog import ImageRef
from d2i.fetch.sources import interleave_by_host


def refs(host: str, num: int) -> list[ImageRef]:
    return [ImageRef("urls", (f"http://{host}/{n}",)) for n in range(num)]


def test_interleave_by_host_spreads_small_host_evenly() -> None:
    ordered = interleave_by_host([*refs("small", 10), *refs("great", 990)])
    positions = [n for n, ref in enumerate(ordered) if "small" in ref.value[0]]
    assert all(80 < right - left < 120 for left, right in itertools.pairwise(positions))


@given(st.lists(st.text(max_size=30), unique=True), st.randoms())
def test_interleave_by_host_ignores_input_order(urls: list[str], rng: random.Random) -> None:
    given_refs = [ImageRef("urls", (url,)) for url in urls]
    ordered = interleave_by_host(given_refs)
    assert sorted(ref.value for ref in ordered) == sorted((url,) for url in urls)
    rng.shuffle(given_refs)
    assert interleave_by_host(given_refs) == ordered
