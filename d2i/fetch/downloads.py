"""Images that img2dataset has downloaded before, found by URL or by img2dataset's key.

Each shard has a `00000.parquet` with the status of every URL. Its images are in `00000.tar`, in the
directory `00000`, or in a column of the Parquet file itself: img2dataset's output formats
webdataset, files and parquet. The index over all shards is built once per machine and kept in the
user's cache. Must not import torch.
"""

from __future__ import annotations

import bisect
import fnmatch
import itertools
import json
import logging
import re
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from d2i.errors import ConfigError, DataError
from d2i.fetch.known_placeholders import KnownPlaceholders
from d2i.fetch.result import FetchResult
from d2i.images.decode import ImageRejectedError
from d2i.images.image_files import read_image
from d2i.images.tar_index import cached_table, name_hash
from d2i.io import storage
from d2i.io.checksums import sha256_of
from d2i.io.parse import damaged

_FORMAT = "downloads 1"
_SHARD = re.compile(r"\d+\.parquet")
_SUFFIXES = ("jpg", "png", "webp")
"""Formats that img2dataset encodes to (`--encode_format`): suffixes of files and members, or a
column."""
_SIDES = ("width", "height", "original_width", "original_height")
_AGAIN = "copy it again, or let img2dataset finish it"
_BATCH = 16
"""Rows of a Parquet file decoded at once on the way to one of them, to save memory (our
default)."""
_PAGE_BYTES = 1 << 20


@dataclass(frozen=True)
class _Shard:
    """Shard that img2dataset wrote: its URL without a suffix, and where its images are."""

    url: str
    kind: Literal["tar", "files", "parquet"]

    @property
    def parquet_url(self) -> str:
        return f"{self.url}.parquet"


@dataclass(frozen=True)
class Download:
    """A downloaded image.

    Args:
        shard: The shard that has it.
        row: Its row in the shard's Parquet file.
        key: Its name in the shard.
        sha256: Hash of the bytes that the host sent, if img2dataset kept it.
        is_original: Whether img2dataset kept those very bytes, by its own account.
    """

    shard: _Shard
    row: int
    key: str
    sha256: str | None
    is_original: bool


class Downloads:
    """Index of the images that img2dataset has downloaded.

    Args:
        shards: In the order of their numbers in the index.
        table: The index; see `_build`.

    Attributes:
        num_resized: Number of images whose width or height differs from the host's.
    """

    def __init__(self, shards: list[_Shard], table: pa.Table) -> None:
        self._shards = shards
        self._rows = table
        self._by_url: NDArray[np.uint64] = table["url_hash"].chunk(0).to_numpy()
        self._by_key: NDArray[np.uint64] = table["key_hash"].chunk(0).to_numpy()
        self.num_resized = int(table.schema.metadata[b"num_resized"])

    def __len__(self) -> int:
        """Return the number of downloaded images."""
        return len(self._by_url)

    def find_url(self, url: str) -> Download | None:
        """Return the first download of a URL, or None.

        URLs are compared by 64 bits of their BLAKE2 hash.
        """
        place = int(np.searchsorted(self._by_url, np.uint64(name_hash(url))))
        if place == len(self) or self._by_url[place] != name_hash(url):
            return None
        return self._download(place)

    def find_key(self, key: str) -> list[Download]:
        """Return all downloads with a key; those in different directories may share one."""
        first, last = (
            int(np.searchsorted(self._by_key, np.uint64(name_hash(key)), side))
            for side in ("left", "right")
        )
        places = self._rows["key_row"].slice(first, last - first).to_pylist()
        return [self._download(place) for place in places]

    def _download(self, place: int) -> Download:
        (row,) = self._rows.slice(place, 1).to_pylist()
        return Download(
            self._shards[row["shard"]], row["row"], row["key"], row["sha256"], row["is_original"]
        )


@cache
def open_downloads(place: str) -> Downloads:
    """Return the index, one per process; build it if this machine has none yet.

    Args:
        place: `FetchConfig.downloads`.

    Raises:
        ConfigError: If it is a URL of a web host.
        DataError: If img2dataset has downloaded nothing there, a shard lacks its images, a file is
            damaged, or the index cannot be cached.
    """
    if storage.names_host(place):
        raise ConfigError(
            f"fetch.downloads {place}: got a web URL; expected a directory that img2dataset has "
            "written, local or in an object store; copy it there first"
        )
    try:
        shards = _find_shards(place)
        decided_by = [[s.url, s.kind, storage.version(s.parquet_url)] for s in shards]
        path = cached_table(json.dumps([_FORMAT, decided_by]), place, lambda: _build(shards, place))
        return Downloads(shards, pa.ipc.open_file(pa.memory_map(str(path))).read_all())
    except OSError as err:
        raise DataError(
            f"fetch.downloads {place}: cannot be read ({err}); expected a directory that "
            "img2dataset has written; check whether its disk is mounted"
        ) from err


def check_downloads(place: str) -> None:
    """Build the index, and warn once if its images are not those that their hosts sent.

    Raises:
        ConfigError, DataError: As in `open_downloads`.
    """
    found = open_downloads(place)
    if found.num_resized:
        logging.getLogger(__name__).warning(
            "fetch.downloads %s: %d of %d images were resized by img2dataset, so their pixels are "
            "not the original ones; to keep the originals, download with 'img2dataset "
            "--resize_mode no --disable_all_reencoding True'",
            *(place, found.num_resized, len(found)),
        )


def read_download(
    found: Download, max_bytes: int, placeholders: KnownPlaceholders, url: str | None = None
) -> FetchResult:
    """Read a downloaded image, under the limits of a fetched one.

    Args:
        found: The download.
        max_bytes: Greatest length of the image.
        placeholders: Known placeholder images.
        url: URL that it was found by, if any.

    Raises:
        DataError: If its shard is gone.
    """
    try:
        data = _read(found, max_bytes)
    except ImageRejectedError as err:
        return FetchResult(None, err.reason, f"{found.shard.url}: {err}", final_url=url)
    is_same = found.sha256 is None or sha256_of(data) == found.sha256
    if found.is_original and not is_same:
        detail = f"{found.shard.url}: {found.key} does not match its recorded sha256"
        return FetchResult(None, "read_error", detail, final_url=url)
    why = placeholders.why(data, url)
    if why is None and found.sha256 in placeholders.sha256:
        why = "fetch.placeholder_sha256 lists what its host sent"
    if why is not None:
        return FetchResult(None, "placeholder", why, final_url=url)
    changed = "" if is_same else ", which re-encoded it"
    detail = f"downloaded by img2dataset{changed}: {found.shard.url}, key {found.key}"
    return FetchResult(data, detail=detail, final_url=url)


def _find_shards(place: str) -> list[_Shard]:
    parent, _, name = place.rpartition("/")
    directories = [place]
    if "*" in name:
        names = fnmatch.filter(storage.list_names(parent or "."), name)
        directories = [storage.join(parent or ".", each) for each in names]
    shards = []
    for directory in directories:
        names = storage.list_names(directory)
        there = frozenset(names)
        stems = [each.removesuffix(".parquet") for each in names if _SHARD.fullmatch(each)]
        shards += [_Shard(storage.join(directory, stem), _kind(stem, there)) for stem in stems]
    if not shards:
        raise DataError(
            f"fetch.downloads {place}: got no 00000.parquet; expected a directory that img2dataset "
            "has written, or DIR/* for several; check the path, and whether its disk is mounted"
        )
    return shards


def _kind(stem: str, names: frozenset[str]) -> Literal["tar", "files", "parquet"]:
    if f"{stem}.tar" in names:
        return "tar"
    return "files" if stem in names else "parquet"


def _build(shards: list[_Shard], place: str) -> pa.Table:
    """Return the index: one row per image, sorted by `url_hash`.

    The column `key_hash` is sorted on its own; `key_row` beside it is the row of each key.
    """
    table = pa.concat_tables(_read_rows(number, shard) for number, shard in enumerate(shards))
    if not table.num_rows:
        raise DataError(
            f"fetch.downloads {place}: got {len(shards)} shards without any downloaded image "
            "(status success); see the errors that img2dataset wrote"
        )
    num_resized = pc.sum(table["is_resized"]).as_py()
    table = table.drop_columns(["is_resized"]).sort_by("url_hash")
    keys = _hashes(table["key"])
    order = np.argsort(keys, kind="stable")
    table = table.append_column("key_hash", pa.array(keys[order]))
    table = table.append_column("key_row", pa.array(order.astype(np.uint64)))
    # One chunk per column, so that each is one array of the memory-mapped file.
    return table.combine_chunks().replace_schema_metadata({"num_resized": str(num_resized)})


def _read_rows(number: int, shard: _Shard) -> pa.Table:
    """Return a shard's rows of images that were downloaded.

    Raises:
        DataError: If the file is damaged or not img2dataset's, or the images are missing.
    """
    try:
        with storage.open_url(shard.parquet_url) as file:
            return _rows_of(number, shard, pq.ParquetFile(file, pre_buffer=False))
    except (OSError, pa.ArrowException, UnicodeError) as err:
        # Arrow raises OSErrors of its own, without an errno.
        if isinstance(err, OSError) and err.errno is not None:
            raise
        raise damaged(shard.parquet_url, err, "a Parquet file", next_step=_AGAIN) from err


def _rows_of(number: int, shard: _Shard, parquet: Any) -> pa.Table:
    names = set(parquet.schema_arrow.names)
    if lacking := {"url", "key", "status"} - names:
        raise DataError(
            f"{shard.parquet_url} lacks {', '.join(sorted(lacking))}; expected the columns of "
            "img2dataset; remove the file, or check fetch.downloads"
        )
    wanted = [name for name in ("url", "key", "status", "sha256", *_SIDES) if name in names]
    table = parquet.read(wanted, use_threads=False)
    rows = pc.indices_nonzero(pc.fill_null(pc.equal(table["status"], "success"), fill_value=False))
    table = table.take(rows)
    if len(rows) and shard.kind == "parquet" and not names.intersection(_SUFFIXES):
        raise DataError(
            f"{shard.parquet_url} lists {len(rows)} images, but they are missing; expected "
            f"{shard.url}.tar, a directory {shard.url}, or a column {', '.join(_SUFFIXES)}; put "
            "them beside it"
        )
    return pa.table(
        {
            "url_hash": _hashes(table["url"]),
            "shard": np.full(len(table), number, np.uint32),
            "row": rows.cast(pa.uint32()),
            "key": table["key"].cast(pa.large_string()),
            "sha256": _column(table, "sha256", pa.large_string()),
            # With --disable_all_reencoding img2dataset decodes no image, and records no size.
            "is_original": _is_unmeasured(table),
            "is_resized": _is_resized(table),
        }
    )


def _column(table: pa.Table, name: str, kind: pa.DataType) -> pa.Array | pa.ChunkedArray:
    if name in table.column_names:
        return table[name].cast(kind)
    return pa.nulls(len(table), kind)


def _is_unmeasured(table: pa.Table) -> pa.Array | pa.ChunkedArray:
    if not {"width", "sha256"} <= set(table.column_names):
        return pa.array(np.zeros(len(table), bool))
    return pc.is_null(table["width"])


def _is_resized(table: pa.Table) -> pa.Array | pa.ChunkedArray:
    width, height, original_width, original_height = (
        _column(table, name, pa.int64()) for name in _SIDES
    )
    differs = pc.or_(pc.not_equal(width, original_width), pc.not_equal(height, original_height))
    return pc.fill_null(differs, fill_value=False)


def _hashes(names: pa.ChunkedArray) -> NDArray[np.uint64]:
    texts = names.cast(pa.large_string()).to_pylist()
    return np.fromiter((name_hash(text or "") for text in texts), np.uint64, len(texts))


def _read(found: Download, max_bytes: int) -> bytes:
    if found.shard.kind == "parquet":
        return _read_cell(found, max_bytes)
    root = found.shard.url + (".tar" if found.shard.kind == "tar" else "")
    try:
        return _read_named(root, found.key, max_bytes)
    except DataError as err:
        raise DataError(str(err).replace("corpus.image_root", "fetch.downloads")) from err


def _read_named(root: str, key: str, max_bytes: int) -> bytes:
    for suffix in _SUFFIXES:
        try:
            return read_image(root, f"{key}.{suffix}", max_bytes)
        except ImageRejectedError as err:
            if err.reason != "missing_file":
                raise
    raise ImageRejectedError("read_error", f"no {key}.jpg, although it was downloaded")


def _read_cell(found: Download, max_bytes: int) -> bytes:
    url = found.shard.parquet_url
    try:
        with storage.open_url(url) as file:
            data = _cell(pq.ParquetFile(file, pre_buffer=False, buffer_size=_PAGE_BYTES), found.row)
    except FileNotFoundError as err:
        raise DataError(
            f"{url} has disappeared while its images were being read; check fetch.downloads, and "
            "whether its disk is mounted"
        ) from err
    except (OSError, pa.ArrowException) as err:
        raise ImageRejectedError("read_error", str(err)) from err
    if not isinstance(data, bytes):
        raise ImageRejectedError("read_error", f"row {found.row} has no image")
    if len(data) > max_bytes:
        raise ImageRejectedError("too_many_bytes", f"over {max_bytes} bytes")
    return data


def _cell(parquet: Any, row: int) -> object:
    """Return the image of a row; its row group is decoded a few rows at a time, up to that row."""
    name = next((name for name in _SUFFIXES if name in parquet.schema_arrow.names), None)
    meta = parquet.metadata
    ends = [*itertools.accumulate(meta.row_group(n).num_rows for n in range(meta.num_row_groups))]
    group = bisect.bisect_right(ends, row)
    left = row - (ends[group - 1] if group else 0)
    for batch in parquet.iter_batches(_BATCH, [group], [name], use_threads=False):
        if left < len(batch):
            return batch.column(0)[left].as_py()
        left -= len(batch)
    return None
