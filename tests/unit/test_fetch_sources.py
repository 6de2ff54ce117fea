"""Files of a folder: each is read once, in order, and never far ahead of who takes them."""

from __future__ import annotations

from pathlib import Path

import pytest

from d2i import picture_files
from d2i.cluster import share
from d2i.config import FetchConfig
from d2i.dialog import ImageRef
from d2i.preprocess.fetch import sources
from d2i.preprocess.fetch.fetched import Fetched
from d2i.preprocess.fetch.sources import NO_ACCESS, PictureSource, host_book

NUM_FILES = 203


def source_of(folder: Path, num_threads: int) -> PictureSource:
    config = FetchConfig(num_threads=num_threads)
    book = share(host_book(config), num_workers=0)
    return PictureSource(str(folder), config, NO_ACCESS, book)


def refs_of(folder: Path) -> list[ImageRef]:
    for number in range(NUM_FILES):
        if number % 7:
            (folder / f"{number:03}").write_text(str(number))
    return [ImageRef("file", (f"{number:03}",)) for number in range(NUM_FILES)]


@pytest.mark.parametrize("num_threads", [1, 3, 16])
def test_every_file_comes_once_and_in_order_also_those_that_are_not_there(
    tmp_path: Path, num_threads: int
) -> None:
    def told(ref: ImageRef, fetched: Fetched) -> tuple[str, str]:
        return ref.value[0], fetched.data.decode() if fetched.data else fetched.reason

    found = list(source_of(tmp_path, num_threads).fetch(refs_of(tmp_path), told))
    assert found == [
        (f"{number:03}", str(number) if number % 7 else "missing_file")
        for number in range(NUM_FILES)
    ]


def test_reading_keeps_near_to_what_was_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    taken: list[ImageRef] = []
    ahead: list[int] = []

    def counted(root: str, path: str, max_bytes: int) -> bytes:
        read.append(path)
        ahead.append(len(read) - len(taken))
        return picture_files.read_picture(root, path, max_bytes)

    monkeypatch.setattr(sources, "read_picture", counted)
    for ref in source_of(tmp_path, 3).fetch(refs_of(tmp_path), lambda ref, _: ref):
        taken.append(ref)  # noqa: PERF402  # How many are taken so far is what is asked.
    assert len(read) == NUM_FILES
    # Three threads' runs, and the one that is being taken.
    assert max(ahead) <= 4 * sources._RUN
