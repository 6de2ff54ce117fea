"""Leases on names: visible to other processes, and released when their process ends."""

from __future__ import annotations

import fcntl
import hashlib
import os
import struct
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# struct flock of 64-bit Linux: type, whence, start, length, pid (0 for these locks).
_FLOCK = "hhqqi4x"
_OPEN: weakref.WeakKeyDictionary[FileLeases, weakref.finalize[[int], FileLeases]] = (
    weakref.WeakKeyDictionary()
)


def _close_all() -> None:
    for close in list(_OPEN.values()):
        close()


os.register_at_fork(after_in_child=_close_all)


class FileLeases:
    """Shared and exclusive leases on names, among all that open the same file.

    Each name is locked as one byte of the file (Linux's open file description locks). So one open
    file serves any number of leases, and the kernel releases them however the process ends. Threads
    that share this object share its leases. A forked child has none: the file it inherits is
    closed, or its parent's leases would outlive the parent.

    Args:
        path: The lock file, on a local disk; created if absent.
    """

    def __init__(self, path: Path) -> None:
        self._path = str(path)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        _OPEN[self] = weakref.finalize(self, os.close, self._file)

    def shared(self, name: str) -> None:
        """Take a shared lease on a name; wait while another holder has it exclusively."""
        self._lock(fcntl.F_OFD_SETLKW, fcntl.F_RDLCK, name)

    def is_held(self, name: str) -> bool:
        """Return whether another holder has a lease on a name, shared or exclusive."""
        found = self._lock(fcntl.F_OFD_GETLK, fcntl.F_WRLCK, name)
        return bool(struct.unpack(_FLOCK, found)[0] != fcntl.F_UNLCK)

    @contextmanager
    def exclusive(self, name: str) -> Iterator[None]:
        """Hold an exclusive lease on a name; wait while others hold it.

        Only for names that nobody shares: two holders that wait for each other would deadlock.
        """
        self._lock(fcntl.F_OFD_SETLKW, fcntl.F_WRLCK, name)
        try:
            yield
        finally:
            self.drop(name)

    @contextmanager
    def try_exclusive(self, *names: str) -> Iterator[bool]:
        """Yield True with exclusive leases on all names, False if another holds any; never wait."""
        owned: list[str] = []
        try:
            with suppress(BlockingIOError):
                for name in names:
                    self._lock(fcntl.F_OFD_SETLK, fcntl.F_WRLCK, name)
                    owned.append(name)
            yield len(owned) == len(names)
        finally:
            for name in owned:
                self.drop(name)

    def drop(self, name: str) -> None:
        """Release a lease, if there is one."""
        self._lock(fcntl.F_OFD_SETLK, fcntl.F_UNLCK, name)

    def _lock(self, command: int, kind: int, name: str) -> bytes:
        byte = int(hashlib.sha256(name.encode()).hexdigest()[:15], 16)
        lock = struct.pack(_FLOCK, kind, os.SEEK_SET, byte, 1, 0)
        try:
            return fcntl.fcntl(self._file, command, lock)
        except BlockingIOError:
            raise
        except OSError as err:
            # On a file system without such locks, the user has to move the cache to another.
            err.filename = err.filename or self._path
            raise
