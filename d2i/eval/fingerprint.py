"""Fingerprints of a system's files, so that scores of earlier files are never reused.

Finished tasks are not generated again: without the hash, a run that was trained further, or a
directory whose images were replaced, would show its old scores.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from d2i.eval.system import SystemSpec
from d2i.eval.systems.images import is_image
from d2i.io import checksums, storage
from d2i.shards import data_set_url
from d2i.shards.manifest import MANIFEST_NAME
from d2i.weights_resolve import resolve_weights


def hash_contents(spec: SystemSpec) -> dict[str, str]:
    """Return the sha256 of each path or URL that a system is loaded from.

    Local files are hashed by content, remote ones by what their store lists: length, time, ETag.
    Anything else, such as a hub repository or a function, has no hash.
    """
    found = {}
    for location in _locations(spec):
        files = sorted(_hash_files(location, images_only=spec.kind == "images"))
        if files:
            lines = "\n".join(f"{digest} {name}" for name, digest in files)
            found[location] = hashlib.sha256(lines.encode()).hexdigest()
    return found | (hash_contents(spec.inner) if spec.inner else {})


def _locations(spec: SystemSpec) -> Iterator[str]:
    if spec.network:
        yield str(spec.network.weights)
    elif spec.kind == "retrieve":
        # The manifest contains the hashes of everything that is retrieved.
        yield storage.join(data_set_url(spec.target, "train"), MANIFEST_NAME)
    elif spec.target == storage.absolute(spec.target):
        # Of a function of the user's, the target is a name, even where a file is called like it.
        yield spec.target
    if spec.adapter:
        yield spec.adapter.path


def _hash_files(location: str, *, images_only: bool) -> Iterator[tuple[str, str]]:
    """Yield name and hash of the file at a path or URL, or of all files below it."""
    local = storage.local_path(location)
    if local is None:
        versions = storage.list_versions(location).items()
        yield from (found for found in versions if not found[0].endswith(checksums.SUFFIX))
        return
    path = Path(resolve_weights(str(local)))
    names = [""] if path.is_file() else [str(found.relative_to(path)) for found in path.rglob("*")]
    for name in names:
        file = path / name
        # Checksum files are no content, and may be deleted.
        is_content = file.is_file() and not name.endswith(checksums.SUFFIX)
        if is_content and (is_image(name) or not images_only):
            yield name, checksums.known_sha256(str(file))
