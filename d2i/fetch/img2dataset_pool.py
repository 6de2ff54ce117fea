"""Thread pool of downloads: img2dataset's downloader with our opener, resizer and writer.

img2dataset runs the threads and bounds what is in flight. It gets a token in place of each URL: our
opener handles nothing else, so no request can leave unguarded (docs/threats.md, URLs). Our resizer
passes the bytes through, and our writer opens the images.
"""

from __future__ import annotations

import email.message
import io
import os
import queue
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
from d2i.fetch.result import FetchResult

_TOKEN = "d2i:"  # A scheme that nothing else handles.
OpenedT = TypeVar("OpenedT")
_LOST = FetchResult(None, "engine_error", "img2dataset returned no result", attempts=0)


def fetch_all(
    refs: Sequence[ImageRef],
    fetch: Callable[[ImageRef, float], FetchResult],
    open_image: Callable[[ImageRef, FetchResult], OpenedT],
    *,
    num_threads: int,
    timeout_s: float,
) -> Iterator[OpenedT]:
    """Fetch images in threads, and yield each, opened, as it arrives.

    Args:
        refs: Images to fetch, without duplicates.
        fetch: Fetches one until a deadline on the monotonic clock, or returns its failure; called
            in `num_threads` threads.
        open_image: Decodes a fetched image, or passes its failure on; called by one thread at a
            time.
        num_threads: Images fetched at once; a few times as many wait to be opened or consumed.
        timeout_s: After so many seconds the remaining images fail with `shard_timeout`.

    Raises:
        Exception: The first error of `open_image`; a failed image raises none.
    """
    if not refs:
        return
    opener = _Opener(refs, fetch, time.monotonic() + timeout_s)
    writer = _Writer(refs, opener, open_image, max_waiting=num_threads)
    with tempfile.TemporaryDirectory(prefix="d2i-fetch-") as directory, _installed(opener):
        download = _engine(Path(directory), len(refs), writer, num_threads)

        def run() -> None:
            try:
                download()
            finally:
                writer.end()

        # In its own thread: if interrupted inside, img2dataset would wait for itself forever.
        threading.Thread(target=run, daemon=True).start()
        yield from writer.opened()
    for number in writer.missing():
        # img2dataset prints an unexpected error, and goes on without that image.
        yield open_image(refs[number], opener.found[number] or _LOST)


def _engine(
    directory: Path, num_refs: int, writer: _Writer[OpenedT], num_threads: int
) -> Callable[[], object]:
    """Return the function that downloads the tokens of `num_refs` images."""
    # img2dataset imports albumentations, which would check online for a newer version.
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
    from img2dataset.downloader import Downloader

    tokens = pa.table({"url": [f"{_TOKEN}{n}" for n in range(num_refs)]})
    with (
        pa.OSFile(str(directory / "tokens.arrow"), "wb") as file,
        pa.ipc.new_file(file, tokens.schema) as tokens_file,
    ):
        tokens_file.write_table(tokens)
    download = Downloader(
        sample_writer_class=lambda *_: writer,
        resizer=_pass_on,
        thread_count=num_threads,
        save_caption=False,
        extract_exif=False,
        output_folder=str(directory),
        column_list=["url"],
        timeout=None,
        number_sample_per_shard=max(num_refs, 2),
        oom_shard_count=1,
        compute_hash=None,
        verify_hash_type=None,
        encode_format="jpg",
        retries=0,
        user_agent_token=None,
        disallowed_header_directives=None,
    )
    return lambda: download((0, str(directory / "tokens.arrow")))


class _Opener:
    """Replacement for urllib's opener that handles only tokens."""

    def __init__(
        self,
        refs: Sequence[ImageRef],
        fetch: Callable[[ImageRef, float], FetchResult],
        deadline: float,
    ) -> None:
        self._refs = refs
        self._fetch = fetch
        self._deadline = deadline
        self.found: list[FetchResult | None] = [None] * len(refs)

    def give_up(self) -> None:
        """Fail all images that have not started."""
        self._deadline = 0.0

    def open(self, request: urllib.request.Request, *_: object) -> _Body:
        """Fetch the image that a token stands for.

        Raises:
            ValueError: If the request is not for a token.
            OSError: If the image cannot be fetched; `found` has the reason.
        """
        if not request.full_url.startswith(_TOKEN):
            raise ValueError(f"not a d2i token: {request.full_url}")
        number = int(request.full_url.removeprefix(_TOKEN))
        if time.monotonic() >= self._deadline:
            found = FetchResult(
                None,
                "shard_timeout",
                "its shard took longer than fetch.shard_timeout_s",
                attempts=0,
            )
        else:
            found = self._fetch(self._refs[number], self._deadline)
        # The bytes go through img2dataset, which bounds how many wait; they are not kept here.
        self.found[number] = found.without_data()
        if found.data is None:
            raise OSError(found.reason)
        return _Body(found.data)


class _Body(io.BytesIO):
    """Response body as img2dataset reads it."""

    headers = email.message.Message()


class _Writer(Generic[OpenedT]):
    """Replacement for img2dataset's writer: opens each image, and queues it for the consumer.

    Args:
        refs: The images, by number.
        opener: Has the result of each fetch.
        open_image: Opens one image.
        max_waiting: Most opened images that wait to be consumed.
    """

    def __init__(
        self,
        refs: Sequence[ImageRef],
        opener: _Opener,
        open_image: Callable[[ImageRef, FetchResult], OpenedT],
        max_waiting: int,
    ) -> None:
        self._refs = refs
        self._opener = opener
        self._open_image = open_image
        self._queue: queue.Queue[tuple[int, OpenedT] | None] = queue.Queue(max_waiting)
        self._left = set(range(len(refs)))
        self._failure: Exception | None = None
        self._is_wanted = True

    def write(self, data: bytes | None, _key: str, _caption: None, meta: dict[str, Any]) -> None:
        """Open and queue one image, or its failure."""
        if not self._is_wanted:
            return
        number = int(meta["url"].removeprefix(_TOKEN))
        found = self._opener.found[number] or _LOST
        try:
            opened = self._open_image(self._refs[number], found.with_data(data))
        except Exception as err:
            # img2dataset would print the error and go on.
            self._failure, self._is_wanted = err, False
            self._opener.give_up()
        else:
            self._queue.put((number, opened))

    def close(self) -> None:
        """Do nothing: each image was queued when it was written."""

    def end(self) -> None:
        """Queue the end marker."""
        self._queue.put(None)

    def opened(self) -> Iterator[OpenedT]:
        """Yield the opened images until the end marker.

        Raises:
            Exception: The first error of opening an image.
        """
        try:
            while (item := self._queue.get()) is not None:
                number, opened = item
                self._left.remove(number)
                yield opened
        except BaseException:
            # Requests in flight end at their own deadlines, and img2dataset's threads with them.
            self._is_wanted = False
            self._opener.give_up()
            while self._queue.get() is not None:
                pass
            raise
        if self._failure:
            raise self._failure

    def missing(self) -> list[int]:
        """Return the numbers of the images that never arrived."""
        return sorted(self._left)


def _pass_on(stream: io.BytesIO, _boxes: None) -> tuple[bytes, None, None, None, None, None]:
    """Replace img2dataset's resizer: pass the bytes on, as `_Writer` opens the images later."""
    return stream.getvalue(), None, None, None, None, None


@contextmanager
def _installed(opener: _Opener) -> Iterator[None]:
    before = urllib.request._opener  # type: ignore[attr-defined]
    urllib.request.install_opener(opener)  # type: ignore[arg-type]
    try:
        yield
    finally:
        urllib.request.install_opener(before)
