"""The data sets of a directory: itself, or one for each split. Must not import torch or ray."""

from __future__ import annotations

from d2i.dialog import SPLITS
from d2i.errors import ConfigError
from d2i.io import storage
from d2i.shards.commit import COMMIT_SUFFIX
from d2i.shards.manifest import CHECKSUM_NAME, MANIFEST_NAME


def split_url(data_url: str, split: str) -> str | None:
    """Return the data set of a split in a directory, `DIR/SPLIT`, or None if there is none."""
    inner = storage.join(data_url, split)
    return inner if storage.exists(storage.join(inner, MANIFEST_NAME)) else None


def data_set_url(data_url: str, split: str) -> str:
    """Return the data set of a split: `DIR/SPLIT` if there is one, else `DIR` itself."""
    return split_url(data_url, split) or data_url


def find_data_sets(directory: str) -> list[str]:
    """Return the directory itself if it is a data set, else the splits below it.

    A data set that lost its manifest, or never had one, counts too, so that it is not skipped.

    Raises:
        ConfigError: If there is none.
    """
    places = [directory, *(storage.join(directory, split) for split in SPLITS)]
    found = [url for url in places if _is_data_set(url)]
    if not found:
        raise ConfigError(
            f"{directory} has no manifest.json; expected a directory made by d2i preprocess; "
            "run the same command again to finish it, or check the path"
        )
    return found


def _is_data_set(url: str) -> bool:
    names = storage.list_names(url)
    is_made = any(n in (MANIFEST_NAME, CHECKSUM_NAME) or n.endswith(COMMIT_SUFFIX) for n in names)
    return is_made or storage.exists(storage.join(url, "plan", "plan.json"))
