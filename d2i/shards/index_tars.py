"""Index tars that d2i did not write, for random access and checks of their bytes.

Reads each tar once and changes none. Must not import torch or ray.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from d2i.errors import ConfigError
from d2i.io import checksums, storage
from d2i.io.prefetch import prefetch_map
from d2i.shards.dataset import is_prepared
from d2i.shards.index import index_bytes
from d2i.shards.tar_scan import ScannedTar, scan_tar
from d2i.shards.tar_set import (
    INDEX_DIRECTORY,
    IndexedTar,
    TarLayout,
    TarSet,
    index_name,
    is_tar_name,
    list_url,
)
from d2i.shards.writer import file_info

_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tar.lz4")


@dataclass(frozen=True)
class IndexedTars:
    """The result of `index_tars`.

    Attributes:
        tars: The list that was written.
        num_other_files: Files in the tars that belong to no sample.
    """

    tars: TarSet
    num_other_files: int


def index_tars(
    url: str, *, num_threads: int = 4, on_progress: Callable[[int, int], None] | None = None
) -> IndexedTars:
    """Write an index of each tar in a directory, and their list, to its `d2i-index/`.

    Repeating it reads the tars again, and writes the same bytes if they are the same.

    Args:
        url: The directory: a path or an fsspec URL.
        num_threads: Tars read at once.
        on_progress: Called in this thread with the number of tars done, and their total.

    Raises:
        ConfigError: If there is no tar, or d2i wrote them.
        ShardError: If a tar is damaged, truncated or compressed, or repeats a key or a member.
    """
    names = _tar_names(url)
    done, num_other_files = [], 0
    with storage.exclusive_lock(storage.join(url, INDEX_DIRECTORY)):
        for tar, num_others in prefetch_map(partial(_index_tar, url), names, num_threads):
            done.append(tar)
            num_other_files += num_others
            if on_progress is not None:
                on_progress(len(done), len(names))
        tars = TarSet(shardlist=tuple(done))
        checksums.write_bytes(list_url(url), tars.to_bytes())
        _remove_other_indexes(url, tars)
    return IndexedTars(tars, num_other_files)


def _index_tar(url: str, name: str) -> tuple[IndexedTar, int]:
    found = scan_tar(storage.join(url, name))
    data = index_bytes(found.rows, TarLayout(found.suffixes))
    place = storage.join(url, index_name(name))
    if not storage.exists(place) or storage.read_bytes(place) != data:
        storage.write_bytes(place, data)
    return describe_tar(name, found, data), found.num_other_files


def describe_tar(name: str, found: ScannedTar, index_data: bytes) -> IndexedTar:
    """Return the entry of a tar in the list."""
    return IndexedTar(
        url=f"../{name}",
        nsamples=len(found.rows),
        filesize=found.info.size_bytes,
        sha256=found.info.sha256,
        index_file=file_info(index_data),
        suffixes=found.suffixes,
        arrays=found.arrays,
    )


def _tar_names(url: str) -> list[str]:
    if is_prepared(url):
        raise ConfigError(
            f"{url} was made by d2i preprocess, which indexes its shards itself; expected "
            f"tars that d2i did not write; run `d2i verify {url}`"
        )
    listed = storage.list_names(url)
    compressed = [name for name in listed if name.lower().endswith(_COMPRESSED)]
    if compressed:
        raise ConfigError(
            f"{url} holds {len(compressed)} compressed tars, such as {compressed[0]}; expected "
            "plain ones: nothing inside a compressed tar can be reached directly; decompress them"
        )
    names = [name for name in listed if is_tar_name(name)]
    capitals = [name for name in names if not name.endswith(".tar")]
    if capitals:
        raise ConfigError(
            f"{url} holds {capitals[0]}; expected names of tars that end in .tar, in lower case; "
            "rename it to .tar"
        )
    if not names:
        raise ConfigError(
            f"{url} has no .tar file; expected WebDataset tars in it, not in directories below it; "
            "check the path"
        )
    return names


def _remove_other_indexes(url: str, tars: TarSet) -> None:
    """Remove the indexes of tars that are no longer there."""
    directory = storage.join(url, INDEX_DIRECTORY)
    kept = {tar.index_name.rpartition("/")[2] for tar in tars.shards}
    for name in storage.list_names(directory):
        if name.endswith(".arrow") and name not in kept:
            storage.remove(storage.join(directory, name))
