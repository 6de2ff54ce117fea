"""The data sets of a directory: itself, or one for each split. Must not import torch or ray."""

from __future__ import annotations

from d2i.dialog import SPLITS
from d2i.errors import ConfigError, ShardError
from d2i.io import storage
from d2i.shards.commit import COMMIT_SUFFIX, parse_record
from d2i.shards.manifest import CHECKSUM_NAME, MANIFEST_NAME, Manifest
from d2i.shards.tar_set import is_tar_name, list_url


def split_url(data_url: str, split: str) -> str | None:
    """Return the data set of a split in a directory, `DIR/SPLIT`, or None if there is none."""
    inner = storage.join(data_url, split)
    is_there = storage.exists(storage.join(inner, MANIFEST_NAME)) or is_indexed(inner)
    return inner if is_there else None


def data_set_url(data_url: str, split: str) -> str:
    """Return the data set of a split: `DIR/SPLIT` if there is one, else `DIR` itself."""
    return split_url(data_url, split) or data_url


def is_indexed(url: str) -> bool:
    """Return whether a directory holds tars that `d2i index` has listed, and no prepared data."""
    return storage.exists(list_url(url)) and not is_prepared(url)


def is_prepared(url: str) -> bool:
    """Return whether `d2i preprocess` made the data of a directory, finished or not, or damaged.

    A `manifest.json` alone tells it only if it is one of d2i's: others use that name, too.
    """
    names = storage.list_names(url)
    if any(name == CHECKSUM_NAME or name.endswith(COMMIT_SUFFIX) for name in names):
        return True
    return storage.exists(storage.join(url, "plan", "plan.json")) or (
        MANIFEST_NAME in names and _is_manifest(storage.join(url, MANIFEST_NAME))
    )


def find_data_sets(directory: str) -> list[str]:
    """Return the directory itself if it is a data set, else the splits below it.

    A data set that lost its manifest, or never had one, counts too, so that it is not skipped; and
    so do tars that `d2i index` has listed, and without these any `manifest.json`, which may be a
    damaged one.

    Raises:
        ConfigError: If there is none.
    """
    places = [directory, *(storage.join(directory, split) for split in SPLITS)]
    indexed = [url for url in places if is_indexed(url)]
    found = [
        url
        for url in places
        if url in indexed
        or is_prepared(url)
        or (not indexed and storage.exists(storage.join(url, MANIFEST_NAME)))
    ]
    if found:
        return found
    if any(is_tar_name(name) for name in storage.list_names(directory)):
        raise ConfigError(
            f"{directory} has tars, but neither a manifest.json nor an index; expected a directory "
            f"made by d2i preprocess, or indexed; for tars of others run `d2i index {directory}`"
        )
    raise ConfigError(
        f"{directory} has no manifest.json; expected a directory made by d2i preprocess; "
        "run the same command again to finish it, or check the path"
    )


def _is_manifest(url: str) -> bool:
    try:
        parse_record(Manifest, storage.read_bytes(url), url)
    except ShardError:
        return False
    return True
