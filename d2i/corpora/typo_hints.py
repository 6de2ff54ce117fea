"""Likely typos in field names: fields named almost like one that the record lacks.

Other unknown fields are custom data and are ignored. Must not import torch.
"""

import difflib
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

_MIN_SIMILARITY = 0.8
"""Similarity from which a name is a likely typo: `image` of `images`, `speaker_id` of `speaker`."""


def misspelt(fields: Mapping[str, Any], names: tuple[str, ...]) -> str | None:
    """Describe the first field of an object that is a likely typo of a name that it lacks."""
    for name, value in fields.items():
        near = None if value is None or name in names else _nearest(name, names)
        if near is not None and fields.get(near) is None:
            return f"got {name!r}, expected {near!r}"
    return None


@lru_cache(maxsize=1024)
def _nearest(name: str, names: tuple[str, ...]) -> str | None:
    near = difflib.get_close_matches(name.lower(), names, n=1, cutoff=_MIN_SIMILARITY)
    return near[0] if near else None
