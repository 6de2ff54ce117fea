"""A store that d2i treats as remote: it logs fetches, and may kill the fetching process.

    python -m tests.stores URL CACHE [--kill-at NAME] [--fork]

reads all samples of a data set through a cache, prints `read`, and waits for the end of its input;
with `--fork` a child is forked after that, which prints its pid and waits to be killed.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from d2i.shards import ShardReader

LOG_NAME = "fetched.log"


class NotedStore(LocalFileSystem):
    """Local files under `noted://`; each fetch is a line of `fetched.log` next to them."""

    protocol = "noted"
    kill_at: str | None = None
    may_fetch = threading.Event()
    may_fetch.set()

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        stripped: str = super()._strip_protocol(path.removeprefix("noted://"))
        return stripped

    def get_file(self, rpath: str, lpath: str, **_: Any) -> None:
        source = Path(self._strip_protocol(rpath))
        with (source.parent.parent / LOG_NAME).open("a") as log:
            log.write(f"{source.name}\n")
        self.may_fetch.wait()
        data = source.read_bytes()
        with Path(lpath).open("wb") as file:
            file.write(data[: len(data) // 2])
            file.flush()
            if source.name == self.kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            file.write(data[len(data) // 2 :])


fsspec.register_implementation("noted", NotedStore, clobber=True)


def fetched(data: Path) -> list[str]:
    """Return the names of the fetched files of a data set, in order."""
    log = data.parent / LOG_NAME
    return log.read_text().split() if log.exists() else []


def read_all(reader: ShardReader, answers: Queue[Any]) -> None:
    """Read everything with a reader of another process; put its values and keys into a queue."""
    # A new event, because in the parent that forked this process fetches may be blocked.
    NotedStore.may_fetch = threading.Event()
    NotedStore.may_fetch.set()
    indices = range(len(reader))
    reader.prefetch(range(len(reader.manifest.shards)))
    keys = [reader.keys[index] for index in indices]
    answers.put((reader.read(indices)["clip"][:, 0].tolist(), keys))


def main() -> None:
    """Read all samples, print `read`, and wait."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("cache")
    parser.add_argument("--kill-at")
    parser.add_argument("--fork", action="store_true")
    args = parser.parse_args()
    NotedStore.kill_at = args.kill_at
    reader = ShardReader(args.url, cache_dir=args.cache)
    reader.read(range(len(reader)))
    sys.stdout.write("read\n")
    sys.stdout.flush()
    if args.fork and os.fork() == 0:
        sys.stdout.write(f"{os.getpid()}\n")
        sys.stdout.flush()
        signal.pause()
    sys.stdin.read()


if __name__ == "__main__":
    main()
