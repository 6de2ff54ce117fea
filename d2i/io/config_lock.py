"""Lock the settings that determine a directory's content: stored once, compared ever after.

A repeated command continues only if it would have produced the same. Must not import any part of
d2i but `checksums`, `parse`, `storage` and `errors`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from d2i.errors import ConfigError, D2IError
from d2i.io import checksums, storage
from d2i.io.checksums import checksum_url
from d2i.io.parse import damaged, read_json


def lock_or_diff(
    url: str,
    mine: Mapping[str, Any],
    as_now: Callable[[dict[str, Any]], dict[str, Any]] = lambda kept: kept,
) -> list[str]:
    """Store `mine` at a URL, or return the fields in which it differs from what is stored there.

    Args:
        url: A JSON file, written now if absent.
        mine: Nested JSON values.
        as_now: Converts values stored by older versions to the current fields and words.

    Returns:
        As `diff`, with `mine` as what was found; empty if both agree.

    Raises:
        ConfigError: If the stored file cannot be read.
    """
    data = (json.dumps(mine, indent=1, sort_keys=True) + "\n").encode()
    if not storage.exists(url):
        checksums.write_bytes(url, data)
        return []
    kept = read_settings(url)
    try:
        return diff(json.loads(data), as_now(kept))
    except (AttributeError, KeyError, TypeError) as err:
        raise damaged(url, repr(err), next_step=_next_step(url), error=ConfigError) from err


def read_settings(url: str, error: type[D2IError] = ConfigError) -> dict[str, Any]:
    """Read settings that d2i stores as JSON beside the content they determine.

    Raises:
        FileNotFoundError: If there are none.
        D2IError: An `error`, if they are damaged, or were edited and still have their checksum.
    """
    return read_json(url, next_step=_next_step(url), error=error)


def _next_step(url: str) -> str:
    beside = checksum_url(url)
    return (
        f"if you edited it, delete {beside} to accept the edit; otherwise restore it, or choose "
        "another directory"
    )


def with_legacy_defaults(kept: Mapping[str, Any], formerly: Mapping[str, Any]) -> dict[str, Any]:
    """Return stored values, completed with those of fields that did not exist yet.

    Args:
        kept: Nested JSON values.
        formerly: Values by path, such as `recipe.train.seed`; a group that is absent stays absent.
    """
    filled: dict[str, Any] = json.loads(json.dumps(kept))
    for path, value in formerly.items():
        *groups, name = path.split(".")
        group: Any = filled
        for part in groups:
            group = group.get(part) if isinstance(group, dict) else None
        if isinstance(group, dict):
            group.setdefault(name, value)
    return filled


def diff(found: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """Return the fields that differ, each as `image.resolution: 256, expected 512`."""
    return _differences(found, expected, "")


def _differences(found: Mapping[str, Any], expected: Mapping[str, Any], prefix: str) -> list[str]:
    named = []
    for name in sorted({*found, *expected}):
        ours, theirs = found.get(name, "absent"), expected.get(name, "absent")
        if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
            named += _differences(ours, theirs, f"{prefix}{name}.")
        elif ours != theirs:
            named.append(f"{prefix}{name}: {ours}, expected {theirs}")
    return named
