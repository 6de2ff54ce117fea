"""How much memory Arrow takes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa

# What was taken from a pool is given back to it, whenever that is.
_POOLS: list[pa.MemoryPool] = []


@contextmanager
def own_pool() -> Iterator[pa.MemoryPool]:
    """Give the pool that Arrow takes from meanwhile; its `max_memory` is the peak."""
    before = pa.default_memory_pool()
    _POOLS.append(pa.proxy_memory_pool(before))
    pa.set_memory_pool(_POOLS[-1])
    try:
        yield _POOLS[-1]
    finally:
        pa.set_memory_pool(before)
