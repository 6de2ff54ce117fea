"""Work done in threads ahead of the use of its results, and never far ahead."""

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
    """Give the result of each item, in order, with as many items worked on at once.

    `Executor.map` takes all items at once, and keeps what is not yet taken of their results.
    """
    pending: deque[Future[ResultT]] = deque()
    with ThreadPoolExecutor(num_threads) as threads:
        for item in items:
            pending.append(threads.submit(work, item))
            if len(pending) > num_threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
