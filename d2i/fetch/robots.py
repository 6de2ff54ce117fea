"""`X-Robots-Tag`: a host's opt-out of images from collections such as this."""

from __future__ import annotations

import re
from collections.abc import Iterable

_OUR_NAME = "d2i"
"""User agent name by which a host may address d2i alone."""
_DIRECTIVES = frozenset({"noai", "noimageai", "noindex", "noimageindex", "none"})
_VALUED = frozenset({"unavailable_after", "max-snippet", "max-image-preview", "max-video-preview"})
"""Directives with a value after a colon; they are not user agent names."""
_NAME = re.compile(r"[a-z][a-z0-9_.-]*", re.IGNORECASE)


def is_disallowed(values: Iterable[str]) -> bool:
    """Return whether a value of the header forbids the image, to all or to d2i by name."""
    return any(_is_forbidding(value) for value in values)


def _is_forbidding(value: str) -> bool:
    agent: str | None = None
    for part in value.split(","):
        name, colon, directive = (piece.strip().lower() for piece in part.partition(":"))
        if name in _VALUED:
            continue
        if colon and _NAME.fullmatch(name):
            # The directives that follow apply to this user agent alone.
            agent = name
        elif colon:
            # A colon in the time of a date.
            continue
        field_name = directive if colon else name
        if agent in (None, _OUR_NAME) and field_name in _DIRECTIVES:
            return True
    return False
