"""Pictures that hosts send in place of what is gone: told by their names, and by their bytes."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

_NAMES = ("photo_unavailable", "photo_not_available", "image_not_available")
"""What hosts call them, Flickr first (openimages/dataset #9)."""


@dataclass(frozen=True)
class KnownPlaceholders:
    """Which pictures stand for others.

    Args:
        sha256: The hashes of their bytes, in lower-case hexadecimal digits.
    """

    sha256: frozenset[str]

    def why(self, data: bytes, url: str | None = None) -> str | None:
        """Say what shows that these bytes are a placeholder, or return None.

        Args:
            data: The bytes.
            url: Where they came from, if from an address.
        """
        name = (url or "").partition("?")[0].rpartition("/")[2].lower()
        if any(mark in name for mark in _NAMES):
            return "its host says it is gone"
        if self.sha256 and hashlib.sha256(data).hexdigest() in self.sha256:
            return "fetch.placeholder_sha256 names it"
        return None
