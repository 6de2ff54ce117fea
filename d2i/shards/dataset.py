"""The data sets of a directory: itself, or one for each split. Must not import torch or ray."""

from __future__ import annotations

from d2i.dialog import SPLITS
from d2i.errors import ConfigError
from d2i.io import storage
from d2i.shards.commit import COMMIT_SUFFIX
from d2i.shards.manifest import CHECKSUM_NAME, MANIFEST_NAME
from d2i.shards.tar_set import list_url


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
    return storage.exists(list_url(url)) and not storage.exists(storage.join(url, MANIFEST_NAME))


def find_data_sets(directory: str) -> list[str]:
    """Return the directory itself if it is a data set, else the splits below it.

    A data set that lost its manifest, or never had one, counts too, so that it is not skipped; and
    so do tars that `d2i index` has listed.

    Raises:
        ConfigError: If there is none.
    """
    prepared = find_prepared(directory)
    found = [url for url in _places(directory) if url in prepared or is_indexed(url)]
    if found:
        return found
    if any(name.endswith(".tar") for name in storage.list_names(directory)):
        raise ConfigError(
            f"{directory} has tars, but neither a manifest.json nor an index; expected a directory "
            f"made by d2i preprocess, or indexed; for tars of others run `d2i index {directory}`"
        )
    raise ConfigError(
        f"{directory} has no manifest.json; expected a directory made by d2i preprocess; "
        "run the same command again to finish it, or check the path"
    )


def find_prepared(directory: str) -> list[str]:
    """Return the data sets that `d2i preprocess` made: the directory itself, or the splits in it.

    Returns:
        Their URLs, also of data sets without a manifest; empty if there is none.
    """
    return [url for url in _places(directory) if _is_prepared(url)]


def _places(directory: str) -> list[str]:
    return [directory, *(storage.join(directory, split) for split in SPLITS)]


def _is_prepared(url: str) -> bool:
    names = storage.list_names(url)
    is_made = any(n in (MANIFEST_NAME, CHECKSUM_NAME) or n.endswith(COMMIT_SUFFIX) for n in names)
    return is_made or storage.exists(storage.join(url, "plan", "plan.json"))
