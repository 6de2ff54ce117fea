"""Known placeholders: images that hosts send for missing ones, recognized by name or by hash."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

_NAMES = ("photo_unavailable", "photo_not_available", "image_not_available")
"""File names that hosts give them, Flickr's first (openimages/dataset #9)."""


@dataclass(frozen=True)
class KnownPlaceholders:
    """Known placeholder images.

    Args:
        sha256: Hashes of their bytes, in lower-case hexadecimal digits.
    """

    sha256: frozenset[str]

    def why(self, data: bytes, url: str | None = None) -> str | None:
        """Return the reason why these bytes are a placeholder, or None.

        Args:
            data: The bytes.
            url: Their URL, if they came from one.
        """
        name = (url or "").partition("?")[0].rpartition("/")[2].lower()
        if any(mark in name for mark in _NAMES):
            return "its URL names a placeholder for a missing image"
        if self.sha256 and hashlib.sha256(data).hexdigest() in self.sha256:
            return "fetch.placeholder_sha256 lists it"
        return None
