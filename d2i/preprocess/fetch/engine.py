"""Many pictures by address: img2dataset's downloader, with its three seams filled by ours.

It brings the threads and the bound on what is in flight. Each picture is handed to it as a token
in place of an address: its opener is ours and answers nothing else, so no request can leave
unguarded (threats.md, section 1). Our resizer passes the bytes on, our writer opens them.
"""

from __future__ import annotations

import email.message
import functools
import io
import os
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Generic, TypeVar

import pyarrow as pa

from d2i.dialog import ImageRef
from d2i.preprocess.fetch.fetched import Fetched

_TOKEN = "d2i:"  # A scheme that nothing else answers.
OpenedT = TypeVar("OpenedT")


def fetch_all(
    refs: Sequence[ImageRef],
    fetch: Callable[[ImageRef, float], Fetched],
    open_picture: Callable[[Fetched], OpenedT],
    *,
    num_threads: int,
    timeout_s: float,
) -> dict[ImageRef, tuple[Fetched, OpenedT]]:
    """Fetch pictures in threads, and open each as it comes.

    Args:
        refs: What is fetched, each once.
        fetch: Fetches one until a deadline on the monotonic clock, or says why not; called in
            `num_threads` threads.
        open_picture: Decodes what was fetched, or passes the failure on; called by one thread.
        num_threads: How many are fetched at once; twice as many wait to be opened at most.
        timeout_s: After so many seconds what is left fails with `shard_timeout`.

    Raises:
        Exception: What `open_picture` raised first; a failed picture does not.

    Returns:
        For each picture what was fetched, without its bytes, and what `open_picture` made of it.
    """
    opener = _Opener(refs, fetch, time.monotonic() + timeout_s)
    opened: dict[int, OpenedT] = {}
    if refs:
        with tempfile.TemporaryDirectory(prefix="d2i-fetch-") as folder, _installed(opener):
            _download(Path(folder), opener, open_picture, opened, num_threads)
    return {
        # img2dataset prints what it did not expect, and goes on without that picture.
        ref: (opener.found[n], opened[n] if n in opened else open_picture(_LOST))
        for n, ref in enumerate(refs)
    }


_LOST = Fetched(None, "engine_error", "the download engine gave no result", attempts=0)


def _download(
    folder: Path,
    opener: _Opener,
    open_picture: Callable[[Fetched], OpenedT],
    opened: dict[int, OpenedT],
    num_threads: int,
) -> None:
    # albumentations, which img2dataset imports, would ask the internet for its newest version.
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
    from img2dataset.downloader import Downloader

    tokens = pa.table({"url": [f"{_TOKEN}{n}" for n in range(len(opener.found))]})
    with (
        pa.OSFile(str(folder / "tokens.arrow"), "wb") as file,
        pa.ipc.new_file(file, tokens.schema) as tokens_file,
    ):
        tokens_file.write_table(tokens)
    failures: list[Exception] = []
    writer = functools.partial(_Writer, opened, open_picture, opener.found, failures)
    download = Downloader(
        sample_writer_class=writer,
        resizer=_pass_on,
        thread_count=num_threads,
        save_caption=False,
        extract_exif=False,
        output_folder=str(folder),
        column_list=["url"],
        timeout=None,
        number_sample_per_shard=max(len(opener.found), 2),
        oom_shard_count=1,
        compute_hash=None,
        verify_hash_type=None,
        encode_format="jpg",
        retries=0,
        user_agent_token=None,
        disallowed_header_directives=None,
    )
    done = threading.Event()

    def run() -> None:
        try:
            download((0, str(folder / "tokens.arrow")))
        finally:
            done.set()

    # In a thread of its own: interrupted within it, the engine would wait for itself for ever.
    threading.Thread(target=run, daemon=True).start()
    try:
        done.wait()
    except BaseException:
        # What is under way ends by its own deadline, and the engine's threads with it.
        opener.give_up()
        done.wait()
        raise
    if failures:
        raise failures[0]


class _Opener:
    """Stands where urllib's opener stands, and answers tokens alone."""

    def __init__(
        self, refs: Sequence[ImageRef], fetch: Callable[[ImageRef, float], Fetched], deadline: float
    ) -> None:
        self._refs = refs
        self._fetch = fetch
        self._deadline = deadline
        self.found = [_LOST] * len(refs)

    def give_up(self) -> None:
        """Fail all that was not begun yet."""
        self._deadline = 0.0

    def open(self, request: urllib.request.Request, *_: object) -> _Body:
        """Fetch the picture that a token stands for.

        Raises:
            ValueError: If the request is none of ours.
            OSError: If the picture cannot be had; `found` says why.
        """
        if not request.full_url.startswith(_TOKEN):
            raise ValueError(f"no token: {request.full_url}")
        number = int(request.full_url.removeprefix(_TOKEN))
        if time.monotonic() >= self._deadline:
            found = Fetched(None, "shard_timeout", "its shard took too long", attempts=0)
        else:
            found = self._fetch(self._refs[number], self._deadline)
        # The bytes go through the engine, which bounds how many wait; they are not kept here.
        self.found[number] = found.without_data()
        if found.data is None:
            raise OSError(found.reason)
        return _Body(found.data)


class _Body(io.BytesIO):
    """What img2dataset reads as a response."""

    headers = email.message.Message()


class _Writer(Generic[OpenedT]):
    """Stands where img2dataset's writer stands, and opens what comes."""

    def __init__(
        self,
        opened: dict[int, OpenedT],
        open_picture: Callable[[Fetched], OpenedT],
        found: list[Fetched],
        failures: list[Exception],
        *_: object,
    ) -> None:
        self._opened = opened
        self._open_picture = open_picture
        self._found = found
        self._failures = failures

    def write(self, data: bytes | None, _key: str, _caption: None, meta: dict[str, Any]) -> None:
        """Take one picture, or the news that there is none."""
        number = int(meta["url"].removeprefix(_TOKEN))
        try:
            self._opened[number] = self._open_picture(self._found[number].with_data(data))
        except Exception as err:
            # img2dataset would print it and go on.
            self._failures.append(err)

    def close(self) -> None:
        """Do nothing: what was written is where it belongs."""


def _pass_on(stream: io.BytesIO, _boxes: None) -> tuple[bytes, None, None, None, None, None]:
    """Stand where img2dataset's resizer stands: ours opens pictures later, in `_Writer`."""
    return stream.getvalue(), None, None, None, None, None


@contextmanager
def _installed(opener: _Opener) -> Iterator[None]:
    before = urllib.request._opener  # type: ignore[attr-defined]
    urllib.request.install_opener(opener)  # type: ignore[arg-type]
    try:
        yield
    finally:
        urllib.request.install_opener(before)
