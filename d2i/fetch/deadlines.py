"""Connection deadlines: one thread per process closes connections, however slowly they drip."""

from __future__ import annotations

import heapq
import itertools
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field


@dataclass(order=True)
class _Watched:
    deadline: float
    number: int
    connection: socket.socket | None = field(compare=False)


class DeadlineTimer:
    """Timer that shuts connections down at their deadlines. Thread-safe."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._queue: list[_Watched] = []
        self._numbers = itertools.count()
        self._thread: threading.Thread | None = None

    @contextmanager
    def deadline(self, connection: socket.socket, deadline: float) -> Iterator[None]:
        """Shut a connection down at a deadline (monotonic clock), unless the block ends before."""
        watched = _Watched(deadline, next(self._numbers), connection)
        with self._changed:
            heapq.heappush(self._queue, watched)
            if self._queue[0] is watched:
                self._wake()
        try:
            yield
        finally:
            with self._changed:
                # The entry stays queued until its deadline: searching for it would cost more.
                watched.connection = None

    def _wake(self) -> None:
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._run, daemon=True, name="d2i-watchdog")
            self._thread.start()
        self._changed.notify()

    def _run(self) -> None:
        with self._changed:
            while True:
                wait_s = self._close_expired()
                self._changed.wait(wait_s)

    def _close_expired(self) -> float | None:
        """Shut expired connections down; return the seconds to the next deadline, None if idle."""
        while self._queue:
            first = self._queue[0]
            left_s = first.deadline - time.monotonic()
            if first.connection is not None and left_s > 0:
                return left_s
            if first.connection is not None:
                _shut_down(first.connection)
            heapq.heappop(self._queue)
        return None


def _shut_down(connection: socket.socket) -> None:
    with suppress(OSError):
        # Not SSLSocket.shutdown: it would drop the TLS state that the reader still uses.
        socket.socket.shutdown(connection, socket.SHUT_RDWR)


DEADLINES = DeadlineTimer()
"""The timer of this process."""
