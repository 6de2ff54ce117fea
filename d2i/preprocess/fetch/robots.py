"""`X-Robots-Tag`: whether a host keeps a picture from collections such as this."""

from __future__ import annotations

import re
from collections.abc import Iterable

_OUR_NAME = "d2i"
"""The name by which a host may address d2i alone."""
_DIRECTIVES = frozenset({"noai", "noimageai", "noindex", "noimageindex", "none"})
_VALUED = frozenset({"unavailable_after", "max-snippet", "max-image-preview", "max-video-preview"})
"""What has a value of its own after a colon, and is nobody's name."""
_NAME = re.compile(r"[a-z][a-z0-9_.-]*", re.IGNORECASE)


def is_disallowed(values: Iterable[str]) -> bool:
    """Say whether one of the header's values forbids it, to all or to d2i by name."""
    return any(_is_forbidding(value) for value in values)


def _is_forbidding(value: str) -> bool:
    agent: str | None = None
    for part in value.split(","):
        name, colon, directive = (piece.strip().lower() for piece in part.partition(":"))
        if name in _VALUED:
            continue
        if colon and _NAME.fullmatch(name):
            # What follows is said to that one alone.
            agent = name
        elif colon:
            # The time within a date.
            continue
        said = directive if colon else name
        if agent in (None, _OUR_NAME) and said in _DIRECTIVES:
            return True
    return False
