"""Lease on a directory of an object store, which has no locks: one writer at a time.

A lease is a numbered object under `DIR/.d2i-lock/`, created by a conditional write: of two
processes that create the same number, one fails. Its holder renews it every few seconds. A lease
that is not renewed for a minute, or whose process on this machine is gone, is superseded by the
next number. Must not import any part of d2i but `errors`.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from d2i.errors import ConfigError

DIRECTORY_NAME = ".d2i-lock"
RENEW_S = 10.0
STALE_S = 60.0
_POLL_S = 1.0


@contextmanager
def hold_lease(fs: Any, directory: str, url: str, wait_s: float) -> Iterator[None]:
    """Hold the lease on a directory until the context is left.

    Args:
        fs: fsspec's file system.
        directory: The directory's path on it.
        url: The user's URL for it.
        wait_s: How long to wait for a holder that is alive.

    Raises:
        ConfigError: If another process holds it and goes on.
        OSError: If a request to the store fails.
    """
    lease = _Lease(fs, f"{directory.rstrip('/')}/{DIRECTORY_NAME}", url)
    lease.take(wait_s)
    is_over = threading.Event()
    keeper = threading.Thread(target=lease.keep, args=(is_over,), daemon=True)
    keeper.start()
    try:
        yield
    finally:
        is_over.set()
        keeper.join()
        lease.release()


class _Lease:
    def __init__(self, fs: Any, directory: str, url: str) -> None:
        self._fs = fs
        self._directory = directory
        self._url = url
        self._number = 0
        self._holder = _who_this_is() | {"token": secrets.token_hex(16), "since": _now()}
        self._beat = 0

    def take(self, wait_s: float) -> None:
        """Take the lease; wait for a holder that may be gone until that is known."""
        seen: tuple[int, bytes] | None = None
        seen_at = began = time.monotonic()
        is_alive = False
        while True:
            numbers = self._numbers()
            if not numbers and self._try(1, superseded=None):
                return
            newest = numbers[-1] if numbers else 1
            content = self._read(newest)
            if content is None:
                # Released a moment ago: pause before the next request.
                time.sleep(_POLL_S)
                continue
            now = time.monotonic()
            if (newest, content) != seen:
                is_alive = seen is not None and seen[0] == newest
                seen, seen_at = (newest, content), now
            is_stale = now - seen_at > STALE_S or _is_gone(content)
            if is_stale and self._try(newest + 1, superseded=(newest, content)):
                return
            if is_alive and now - began > wait_s:
                raise ConfigError(
                    f"{self._url}: locked by another d2i process ({_described(content)}); wait for "
                    "it to finish, or use another directory"
                )
            time.sleep(_POLL_S)

    def keep(self, is_over: threading.Event) -> None:
        """Renew the lease until it is over; end this process if another has superseded it."""
        while not is_over.wait(RENEW_S):
            # A transient failure of the store is retried; others wait a minute before they take it.
            with suppress(Exception):
                if self._numbers()[-1:] != [self._number]:
                    self._end_process(is_over)
                self._beat += 1
                self._write(self._number)

    def release(self) -> None:
        """Delete the lease, so that others can have the directory at once."""
        with suppress(Exception):
            self._fs.rm_file(self._path(self._number))

    def _end_process(self, is_over: threading.Event) -> None:
        if is_over.is_set():
            return
        sys.stderr.write(
            f"error: {self._url}: another d2i process took over the lease of this directory, as "
            "this process had not renewed it for a minute; wait for that one to finish, then run "
            "the same command again to resume\n"
        )
        sys.stderr.flush()
        # Anything written from now on would mix with the other's files.
        os._exit(2)

    def _try(self, number: int, superseded: tuple[int, bytes] | None) -> bool:
        """Create the lease of this number; return whether this process now holds the directory."""
        if not self._create(number):
            return False
        # Another process that listed a moment ago may have created an older or a newer number.
        is_mine = self._numbers()[-1:] == [number]
        if superseded is not None:
            is_mine = is_mine and self._read(superseded[0]) == superseded[1]
        if not is_mine:
            self._fs.rm_file(self._path(number))
            return False
        self._number = number
        if superseded is not None:
            with suppress(FileNotFoundError):
                self._fs.rm_file(self._path(superseded[0]))
        if self._create(number, is_probe=True):
            logging.getLogger(__name__).warning(
                "%s: this store ignores If-None-Match: it overwrites an object that must only be "
                "created if absent, so two commands started there at the same moment would not "
                "see each other's lock; start one at a time",
                self._url,
            )
        return True

    def _create(self, number: int, *, is_probe: bool = False) -> bool:
        """Create an object only if absent; return whether this process did, by any attempt."""
        for is_last in (False, True):
            try:
                self._fs.pipe_file(self._path(number), self._content(), mode="create")
            except Exception:
                # Each store has its own error for a condition that is not met.
                content = self._read(number)
                if content is not None:
                    # After a lost response, the client's retry finds its own object.
                    return not is_probe and _token(content) == self._holder["token"]
                # Its holder released it in between, or the store refuses to write at all.
                if is_last:
                    raise
            else:
                break
        return True

    def _write(self, number: int) -> None:
        self._fs.pipe_file(self._path(number), self._content())

    def _content(self) -> bytes:
        return json.dumps(self._holder | {"beat": self._beat}, sort_keys=True).encode()

    def _path(self, number: int) -> str:
        return f"{self._directory}/{number:09d}.json"

    def _numbers(self) -> list[int]:
        self._fs.invalidate_cache()
        try:
            names = [str(name).rpartition("/")[2] for name in self._fs.ls(self._directory, False)]
        except FileNotFoundError:
            return []
        return sorted(int(n.removesuffix(".json")) for n in names if n[:9].isdecimal())

    def _read(self, number: int) -> bytes | None:
        try:
            return bytes(self._fs.cat_file(self._path(number)))
        except FileNotFoundError:
            return None


def _who_this_is() -> dict[str, Any]:
    pid = os.getpid()
    return {
        "host": socket.gethostname(),
        "machine": _machine(),
        "pid": pid,
        "started": _started(pid),
    }


def _machine() -> str:
    """Identify the set of processes visible from here: this boot, and this container."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"  # noqa: PTH115
    except OSError:
        return secrets.token_hex(16)


def _started(pid: int) -> str | None:
    """Return when a process started, in ticks since the boot; None if it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    state, *others = fields.rpartition(")")[2].split()
    return None if state in "ZX" else others[18]


def _is_gone(content: bytes) -> bool:
    """Return whether a holder was a process of this machine that has ended."""
    holder = _parse(content)
    if holder.get("machine") != _machine() or not isinstance(holder.get("pid"), int):
        return False
    return _started(holder["pid"]) != holder.get("started")


def _token(content: bytes) -> object:
    return _parse(content).get("token")


def _described(content: bytes) -> str:
    holder = _parse(content)
    return f"process {holder.get('pid')} on {holder.get('host')}, since {holder.get('since')}"


def _parse(content: bytes) -> dict[str, Any]:
    try:
        holder = json.loads(content)
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) else {}


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
