"""One thread of this process ends connections at their deadlines, however slowly they drip."""

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
    """Shuts connections down at their deadlines. Safe to call from several threads."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._queue: list[_Watched] = []
        self._numbers = itertools.count()
        self._thread: threading.Thread | None = None

    @contextmanager
    def deadline(self, connection: socket.socket, deadline: float) -> Iterator[None]:
        """Shut a connection down at a deadline on the monotonic clock, unless left before."""
        watched = _Watched(deadline, next(self._numbers), connection)
        with self._changed:
            heapq.heappush(self._queue, watched)
            if self._queue[0] is watched:
                self._wake()
        try:
            yield
        finally:
            with self._changed:
                # It stays queued until its deadline: to look for it would cost more.
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
        """Return for how long nothing is due, in seconds; None where nothing is watched."""
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
        # The plain socket's own: that of a TLS socket takes its state away from the reader.
        socket.socket.shutdown(connection, socket.SHUT_RDWR)


DEADLINES = DeadlineTimer()
"""The one of this process."""
