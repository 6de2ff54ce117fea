"""Prefetch: work done in threads ahead of the use of its results, by a bounded distance."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


def prefetch_map(
    work: Callable[[ItemT], ResultT], items: Iterable[ItemT], num_threads: int
) -> Iterator[ResultT]:
    """Yield the result of each item, in order, with `num_threads` items in progress at once.

    `Executor.map` would take all items at once, and keep every result that is not consumed yet.
    """
    pending: deque[Future[ResultT]] = deque()
    with ThreadPoolExecutor(num_threads) as threads:
        for item in items:
            pending.append(threads.submit(work, item))
            if len(pending) > num_threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
