"""Claims on names: seen by other processes, and never outliving the process that has them."""

from __future__ import annotations

import fcntl
import hashlib
import os
import struct
import weakref
from pathlib import Path

# struct flock of 64-bit Linux: type, whence, start, length, process (0 for these locks).
_FLOCK = "hhqqi4x"


class Claims:
    """Shared and sole claims on names, among all that open the same file.

    A byte of the file stands for a name (Linux's open file description locks), so that one open
    file serves any number of claims, and the kernel lifts them when the process ends in whatever
    way. Threads that share this object share its claims.

    Args:
        path: The file, on a disk of this machine; made where it is not there.
    """

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        weakref.finalize(self, os.close, self._file)

    def share(self, name: str) -> None:
        """Claim a name beside others; wait while another has it alone."""
        self._lock(fcntl.F_OFD_SETLKW, fcntl.F_RDLCK, name)

    def own(self, name: str) -> None:
        """Claim a name alone, giving up a shared claim first; wait while others have it."""
        # Two that wait for each other to give up theirs would wait for ever.
        self.drop(name)
        self._lock(fcntl.F_OFD_SETLKW, fcntl.F_WRLCK, name)

    def try_own(self, name: str) -> bool:
        """Claim a name alone where no other has it, and say so; a shared claim is kept else."""
        try:
            self._lock(fcntl.F_OFD_SETLK, fcntl.F_WRLCK, name)
        except BlockingIOError:
            return False
        return True

    def drop(self, name: str) -> None:
        """Give up a claim, if there is one."""
        self._lock(fcntl.F_OFD_SETLK, fcntl.F_UNLCK, name)

    def _lock(self, command: int, kind: int, name: str) -> None:
        byte = int(hashlib.sha256(name.encode()).hexdigest()[:15], 16)
        fcntl.fcntl(self._file, command, struct.pack(_FLOCK, kind, os.SEEK_SET, byte, 1, 0))
