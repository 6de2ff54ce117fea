"""Images embedded in the records themselves: `plan/inline/SHA256`, each written once.

The planner keeps those of planned instances. Workers read them by name and check the content
against it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from d2i.corpora.compact_set import CompactHashSet
from d2i.corpora.inline import InlineImages, inline_sha256
from d2i.dialog import ImageRef, Instance
from d2i.fetch.result import FetchResult
from d2i.io import storage

INLINE_DIRECTORY = "inline"
"""Name of the directory within `plan/`."""
_MAX_WAITING_BYTES = 256 << 20
"""Limit for images that were read but are not yet known to be planned."""


class InlineWriter:
    """Keeps the images of planned instances, and of no others.

    Args:
        scratch: A local directory for images that may not be planned.
        split_url: The data set; None to keep nothing.
    """

    def __init__(self, scratch: Path, split_url: str | None) -> None:
        self._scratch = scratch
        self._split_url = split_url
        self._published = CompactHashSet()
        self._waiting_bytes = 0

    def images(self, max_bytes: int) -> InlineImages:
        """Return the corpus reader's handler, which keeps images of at most `max_bytes`."""
        return InlineImages(max_bytes, self._keep if self._split_url is not None else None)

    def _keep(self, sha256: str, data: bytes) -> None:
        path = self._scratch / sha256
        if hash(sha256) in self._published or path.exists():
            return
        self._scratch.mkdir(exist_ok=True)
        path.write_bytes(data)
        self._waiting_bytes += len(data)

    def is_full(self) -> bool:
        """Return whether so many bytes wait that some should be published now."""
        return self._waiting_bytes >= _MAX_WAITING_BYTES

    def publish(self, instances: Iterable[Instance]) -> None:
        """Publish the images of planned instances, and drop all other waiting images."""
        if self._split_url is None:
            return
        for instance in instances:
            if instance.image_ref.kind == "inline":
                self._publish(inline_sha256(instance.image_ref), self._split_url)
        if self._waiting_bytes:
            for path in self._scratch.iterdir():
                path.unlink()
            self._waiting_bytes = 0

    def _publish(self, sha256: str, split_url: str) -> None:
        path = self._scratch / sha256
        if path.exists():
            url = storage.join(_directory(split_url), sha256)
            storage.publish_atomically(path, url, sync_name=False)
            self._published.add(hash(sha256))

    def finish(self) -> None:
        """Remove the images of an earlier plan, and sync the directory entries of the others."""
        if self._split_url is None:
            return
        directory = _directory(self._split_url)
        if not storage.exists(directory):
            return
        for name in storage.list_names(directory):
            if hash(name) not in self._published:
                storage.remove(storage.join(directory, name))
        local = storage.local_path(directory)
        if local is not None:
            storage.sync(local)


def read_inline(split_url: str, ref: ImageRef, max_bytes: int) -> FetchResult:
    """Read the image of an `inline` reference of a planned instance.

    A lost or damaged file is a transient failure (`read_error`): the image itself is not at fault.
    """
    name = inline_sha256(ref)
    url = storage.join(_directory(split_url), name)
    try:
        data = storage.read_head(url, max_bytes + 1)
    except OSError as err:
        return FetchResult(None, "read_error", f"{url}: {err}")
    if hashlib.sha256(data).hexdigest() != name:
        return FetchResult(
            None, "read_error", f"{url}: its content does not match the sha256 in its name"
        )
    return FetchResult(data)


def _directory(split_url: str) -> str:
    return storage.join(split_url, "plan", INLINE_DIRECTORY)
