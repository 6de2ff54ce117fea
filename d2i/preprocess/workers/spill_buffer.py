"""Spill buffer on disk for source bytes, from an image's arrival until its sample is written.

Must not import torch.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import IO

from d2i.dialog import ImageRef
from d2i.io import storage
from d2i.preprocess.workers.messages import FetchedImage


class SpillBuffer:
    """The bytes of images in a file, by image reference.

    Args:
        file: An empty file, open for writing and reading.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._spans: dict[ImageRef, tuple[int, int]] = {}

    def put(self, ref: ImageRef, data: bytes) -> None:
        """Store the bytes of one image."""
        self._spans[ref] = (self._file.seek(0, os.SEEK_END), len(data))
        self._file.write(data)

    def get(self, ref: ImageRef) -> bytes | None:
        """Return the bytes of one image, or None if none are stored."""
        if ref not in self._spans:
            return None
        start, size_bytes = self._spans[ref]
        self._file.seek(start)
        return self._file.read(size_bytes)

    def taken_from(self, images: Iterable[FetchedImage]) -> Iterator[FetchedImage]:
        """Yield images without their source bytes, and store the bytes."""
        return map(self._taken, images)

    def _taken(self, found: FetchedImage) -> FetchedImage:
        data, image = found.fetched.data, found.image
        if data is None or image is None:
            return found
        self.put(found.ref, data)
        # Pixels that came through Ray share a block with the bytes, and would keep it in memory.
        image = replace(image, pixels=image.pixels.copy())
        return replace(found, fetched=found.fetched.without_data(), image=image)


@contextmanager
def source_bytes(directory_url: str) -> Iterator[SpillBuffer]:
    """Yield a buffer for the source bytes of one shard, on the disk where the shard is written."""
    with storage.scratch_file(directory_url) as path, path.open("w+b") as file:
        yield SpillBuffer(file)
