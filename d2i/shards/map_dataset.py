"""Prepared data as a dataset for `torch.utils.data`, and as a webdataset pipeline.

Imports no torch: a DataLoader needs of a dataset a length, items and a pickle.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from numbers import Integral
from typing import Any

from d2i.dialog import SPLITS, Turn
from d2i.errors import ConfigError, with_extra
from d2i.io import storage
from d2i.shards.dataset import split_url
from d2i.shards.layout import ArrayInfo
from d2i.shards.manifest import MANIFEST_NAME
from d2i.shards.reader import ShardReader
from d2i.shards.sample import IMAGE_SUFFIXES, check_json, npy_array

_FIELDS = ("key", "context", "image")


class Dataset:
    """The samples of one split, by number: a map-style dataset.

    A sample is a dictionary: `key`, the instance's key; `context`, its turns, a list of
    `d2i.dialog.Turn`, oldest first; `image`, the source bytes of its image, or None if they were
    not kept; and each array by its name, with the dtype and shape that `arrays` gives; the bits of
    bfloat16 come as uint16. An array called `key`, `context` or `image` is under the name of its
    member instead, such as `context.npy`. Contexts differ in length, so a DataLoader needs a
    `collate_fn` of yours, such as `list`.

    May be shared between threads, inherited across a fork and pickled: each process opens the
    files that it reads. Bytes are compared with their checksums when a process first reads them.
    """

    def __init__(self, url: str | os.PathLike[str], split: str | None = None) -> None:
        """Read the manifest.

        Args:
            url: The directory of a split or, with `split`, the one that `d2i preprocess` wrote; a
                path or an fsspec URL.
            split: Such as `train`.

        Raises:
            ConfigError: If there is no such split, or the directory has several and none is named.
            ShardError: If the manifest is missing or damaged, or d2i did not prepare the data:
                `ShardReader` reads tars that `d2i index` has listed.
        """
        self._reader = ShardReader(_data_set(url, split))
        self.arrays: Mapping[str, ArrayInfo] = self._reader.manifest.arrays
        """The arrays of every sample by name, each with its `dtype` and `shape`."""

    @property
    def url(self) -> str:
        """The directory of the split."""
        return self._reader.url

    @property
    def keys(self) -> Sequence[str]:
        """The keys of all samples, in their order."""
        return self._reader.keys

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self._reader)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return a sample.

        Args:
            index: 0 to len - 1; a negative one counts from the end.

        Raises:
            TypeError: If it is not a whole number.
            IndexError: If it is out of range.
            ShardError: If the bytes do not match their checksum.
        """
        row = self._row(index)
        sample = _sample(
            self._reader.keys[row], self._reader.read_json(row), self._reader.read_image(row)
        )
        arrays = self._reader.read([row])
        return sample | {_field(name): values[0] for name, values in arrays.items()}

    def _row(self, index: int) -> int:
        if not isinstance(index, Integral):
            raise TypeError(f"index {index!r} of {self.url}; expected a whole number")
        row, size = operator.index(index), len(self)
        if not -size <= row < size:
            raise IndexError(f"index {row} of {self.url}; expected {-size} to {size - 1}")
        return row % size


def webdataset(url: str | os.PathLike[str], split: str | None = None) -> Any:
    """Return a webdataset pipeline over the tars of one split, in their order.

    Samples are those of `Dataset`, as a stream: nodes and workers of a DataLoader share the tars
    among them, and the pipeline's own `shuffle`, `map` and `batched` follow. Reads each tar from
    its beginning to its end and compares no checksums; `d2i verify` does.

    Args:
        url: As for `Dataset`.
        split: As for `Dataset`.

    Returns:
        A `webdataset.DataPipeline` with webdataset's fluid interface.

    Raises:
        ConfigError: As `Dataset`.
        ShardError: As `Dataset`; of a sample, if its bytes are not those of a shard.
    """
    try:
        import webdataset as wds
    except ModuleNotFoundError as err:
        raise with_extra(err) from err
    place = _data_set(url, split)
    shards = [shard for shard in ShardReader(place).manifest.shards if shard.num_samples]
    if not shards:
        raise ConfigError(f"{place} has no sample; expected one or more; choose another split")
    pipeline = wds.DataPipeline(
        wds.SimpleShardList([storage.join(place, shard.tar_name) for shard in shards]),
        wds.split_by_node,
        wds.split_by_worker,
        _open_tars,
        wds.tariterators.tar_file_expander,
        wds.tariterators.group_by_keys,
        _decode_each,
    )
    return wds.FluidWrapper(pipeline)


def _data_set(url: str | os.PathLike[str], split: str | None) -> str:
    """Return the directory of a split."""
    if not isinstance(url, str | os.PathLike) or not isinstance(split, str | None):
        raise ConfigError(
            f"got the data set {url!r} and the split {split!r}; expected a path or a URL, and a "
            "name such as 'train', or None"
        )
    place = os.fspath(url)
    if split is None and storage.exists(storage.join(place, MANIFEST_NAME)):
        return place
    found = [name for name in SPLITS if split_url(place, name)]
    inner = None if split is None else split_url(place, split)
    if inner or (split is None and not found):
        return inner or place
    got = f"has no split {split!r}" if split else "holds a directory for each split"
    expected = f"one of {', '.join(found)}" if found else "a directory that d2i preprocess wrote"
    hint = f"give split={found[0]!r}" if found else "check the path"
    raise ConfigError(f"{place} {got}; expected {expected}; {hint}")


def _open_tars(sources: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Open each tar while its samples are read; any fsspec URL will do."""
    for source in sources:
        with storage.open_url(source["url"]) as stream:
            yield {**source, "stream": stream}


def _decode_each(samples: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    return map(_decode, samples)


def _decode(members: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sample of the members that webdataset has grouped, by suffix."""
    image = next((members[suffix] for suffix in IMAGE_SUFFIXES if suffix in members), None)
    sample = _sample(members["__key__"], check_json(members.get("json", b"")), image)
    # A copy, as an array over bytes cannot be written to.
    arrays = {
        _field(member.removesuffix(".npy")): npy_array(data).copy()
        for member, data in members.items()
        if member.endswith(".npy")
    }
    return sample | arrays


def _sample(key: str, described: Mapping[str, Any], image: bytes | None) -> dict[str, Any]:
    turns = [Turn(turn["speaker"], turn["text"]) for turn in described["context"]]
    return {"key": key, "context": turns, "image": image}


def _field(name: str) -> str:
    return f"{name}.npy" if name in _FIELDS else name
