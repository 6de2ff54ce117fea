"""Markers: JSON files, written last, that list the finished files with the sha256 of each.

`{"files": {PATH: sha256, …}, "crc32": …}`, the paths relative to one root. Must not import torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from d2i.io import storage
from d2i.io.checksums import has_crc32, json_line
from d2i.io.parse import damaged, parse_json

_RANGE = re.compile(r"\d+-\d+\.json")


def write_marker(url: str, files: Mapping[str, str], *, sync_name: bool = True) -> None:
    """Write a marker: sha256 by path; `sync_name` as in `storage.publish_atomically`."""
    with storage.new_file(url, sync_name=sync_name) as path:
        path.write_bytes(json_line({"files": dict(sorted(files.items()))}))


def parse_marker(data: bytes, url: str, *, next_step: str) -> dict[str, str]:
    """Return the sha256 of each file that a marker lists, by path.

    Raises:
        DataError: If the marker is damaged.
    """
    values = parse_json(data, url, next_step=next_step)
    files = values.get("files")
    if not has_crc32(values) or not isinstance(files, dict):
        raise damaged(url, "its content does not match its crc32", next_step=next_step)
    return {str(path): str(sha256) for path, sha256 in files.items()}


def read_markers(directory_url: str, *, next_step: str) -> dict[str, str]:
    """Read the markers `FIRST-STOP.json` of a directory, merged into one.

    Raises:
        DataError: If one is damaged.
    """
    names = filter(_RANGE.fullmatch, storage.list_names(directory_url))
    urls = [storage.join(directory_url, name) for name in names]
    files: dict[str, str] = {}
    for url, data in zip(urls, storage.read_each(urls), strict=True):
        files |= parse_marker(data, url, next_step=next_step)
    return files
