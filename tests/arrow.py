"""Measure the memory that Arrow allocates."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa

# Buffers are freed in the pool that allocated them, so used pools are kept alive.
_POOLS: list[pa.MemoryPool] = []


@contextmanager
def own_pool() -> Iterator[pa.MemoryPool]:
    """Use a separate Arrow memory pool within the block; its `max_memory` is the peak."""
    before = pa.default_memory_pool()
    _POOLS.append(pa.proxy_memory_pool(before))
    pa.set_memory_pool(_POOLS[-1])
    try:
        yield _POOLS[-1]
    finally:
        pa.set_memory_pool(before)
