"""The host books of a job: each host is in one of them, as one alone could serve only a few nodes.

A book is asked twice a picture, and answers some 3,000 times a second (ours).
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

from d2i.cluster import Shared, num_session_cores, share
from d2i.preprocess.fetch.rate_limiter import HostBook, trouble_in

_CORES_OF_A_BOOK = 16
_MAX_BOOKS = 16
"""All of them are beside the driver, and have its clock."""


@dataclass(frozen=True)
class HostBooks:
    """The manners that all workers keep together.

    Args:
        books: One at least.
        num_trouble_hosts: As their limits'.
    """

    books: tuple[Shared[HostBook], ...]
    num_trouble_hosts: int

    def of(self, host: str) -> Shared[HostBook]:
        """Return the book of a host, the same one for all workers."""
        return self.books[zlib.crc32(host.encode()) % len(self.books)]

    def trouble(self, *, of_names: bool) -> str | None:
        """Say what looks like trouble of this machine's own network; see `trouble_in`."""
        signs = [book.call("signs", of_names=of_names) for book in self.books]
        return trouble_in(signs, self.num_trouble_hosts, of_names=of_names)


def share_books(book: HostBook, *, num_workers: int | None) -> HostBooks:
    """Make books that begin as one does common to all workers of the session that is open.

    Args:
        book: What each begins as.
        num_workers: As the pool's.
    """
    fitting = num_session_cores(num_workers=num_workers) // _CORES_OF_A_BOOK
    num_books = min(max(fitting, 1), _MAX_BOOKS)
    books = tuple(share(book, num_workers=num_workers) for _ in range(num_books))
    return HostBooks(books, book.limits.num_trouble_hosts)
