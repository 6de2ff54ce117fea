"""Claims on names: seen by other processes, and never outliving the process that has them."""

from __future__ import annotations

import fcntl
import hashlib
import os
import struct
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# struct flock of 64-bit Linux: type, whence, start, length, process (0 for these locks).
_FLOCK = "hhqqi4x"
_OPEN: weakref.WeakKeyDictionary[FileLeases, weakref.finalize[[int], FileLeases]] = (
    weakref.WeakKeyDictionary()
)


def _close_all() -> None:
    for close in list(_OPEN.values()):
        close()


os.register_at_fork(after_in_child=_close_all)


class FileLeases:
    """Shared and sole claims on names, among all that open the same file.

    A byte of the file stands for a name (Linux's open file description locks), so that one open
    file serves any number of claims, and the kernel lifts them when the process ends in whatever
    way. Threads that share this object share its claims. A forked child has none: what it inherits
    is closed, or its parent's claims would outlive the parent.

    Args:
        path: The file, on a disk of this machine; made where it is not there.
    """

    def __init__(self, path: Path) -> None:
        self._path = str(path)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        _OPEN[self] = weakref.finalize(self, os.close, self._file)

    def create_shared(self, name: str) -> None:
        """Claim a name beside others; wait while another has it alone."""
        self._lock(fcntl.F_OFD_SETLKW, fcntl.F_RDLCK, name)

    def is_held(self, name: str) -> bool:
        """Say whether another claims a name, shared or alone."""
        found = self._lock(fcntl.F_OFD_GETLK, fcntl.F_WRLCK, name)
        return bool(struct.unpack(_FLOCK, found)[0] != fcntl.F_UNLCK)

    @contextmanager
    def exclusive(self, name: str) -> Iterator[None]:
        """Claim a name alone; wait while others have it.

        Only for names that nobody shares: two that wait for each other would wait for ever.
        """
        self._lock(fcntl.F_OFD_SETLKW, fcntl.F_WRLCK, name)
        try:
            yield
        finally:
            self.drop(name)

    @contextmanager
    def try_exclusive(self, *names: str) -> Iterator[bool]:
        """Claim names alone where no other has any of them, and say so; wait for nobody."""
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
        """Give up a claim, if there is one."""
        self._lock(fcntl.F_OFD_SETLK, fcntl.F_UNLCK, name)

    def _lock(self, command: int, kind: int, name: str) -> bytes:
        byte = int(hashlib.sha256(name.encode()).hexdigest()[:15], 16)
        lock = struct.pack(_FLOCK, kind, os.SEEK_SET, byte, 1, 0)
        try:
            return fcntl.fcntl(self._file, command, lock)
        except BlockingIOError:
            raise
        except OSError as err:
            # A file system without such locks: the user is to give a cache on another.
            err.filename = err.filename or self._path
            raise
