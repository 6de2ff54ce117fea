"""Source bytes that a shard keeps: on disk, from when a picture comes until its sample is written.

Must not import torch.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import IO

from d2i import storage
from d2i.dialog import ImageRef
from d2i.preprocess.messages import FetchedImage


class SpillBuffer:
    """The bytes of pictures, by their references.

    Args:
        file: An empty file, open to be written and read.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._places: dict[ImageRef, tuple[int, int]] = {}

    def put(self, ref: ImageRef, data: bytes) -> None:
        """Keep the bytes of one picture."""
        self._places[ref] = (self._file.seek(0, os.SEEK_END), len(data))
        self._file.write(data)

    def get(self, ref: ImageRef) -> bytes | None:
        """Return the bytes of one picture, or None where none were kept."""
        if ref not in self._places:
            return None
        start, size_bytes = self._places[ref]
        self._file.seek(start)
        return self._file.read(size_bytes)

    def taken_from(self, blocks: Iterable[list[FetchedImage]]) -> Iterator[FetchedImage]:
        """Yield pictures without their source bytes, and keep those."""
        return (self._taken(found) for block in blocks for found in block)

    def _taken(self, found: FetchedImage) -> FetchedImage:
        data, image = found.fetched.data, found.image
        if data is None or image is None:
            return found
        self.put(found.ref, data)
        # Pixels that came through Ray lie in one block with the bytes, and would hold it there.
        image = replace(image, pixels=image.pixels.copy())
        return replace(found, fetched=found.fetched.without_data(), image=image)


@contextmanager
def source_bytes(folder_url: str) -> Iterator[SpillBuffer]:
    """Give a place for the source bytes of one shard, where the shard itself is written."""
    with storage.scratch_file(folder_url) as path, path.open("w+b") as file:
        yield SpillBuffer(file)
