"""Tars that d2i did not write: what `d2i index` keeps of them, in a directory beside the tars.

`d2i-index/NAME.arrow` is the index of `NAME.tar`, in the form of `d2i.shards.index`.
`d2i-index/shards.json`, with its sha256 beside it, lists the tars in the fields that wids reads,
and adds checksums, suffixes and arrays. Must not import torch or ray.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from d2i.errors import ShardError
from d2i.io import checksums, storage
from d2i.shards.commit import Count, FileInfo, JsonRecord, Sha256, parse_record
from d2i.shards.layout import ArrayInfo

INDEX_DIRECTORY = "d2i-index"
LIST_NAME = "shards.json"
ARRAY_DTYPES = frozenset(
    f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)
) | {"bool", "float16", "float32", "float64", "complex64", "complex128"}
"""The dtypes, by numpy's name and little-endian, of the members that are read as arrays."""


@dataclass(frozen=True)
class TarLayout:
    """The members of an indexed tar: any suffixes, under any headers.

    Args:
        suffixes: Those that occur in it, sorted, in lower case.
    """

    suffixes: tuple[str, ...]

    key_pattern: ClassVar[str] = r"[\s\S]+"
    max_member_size_bytes: ClassVar[int] = 1 << 62
    is_canonical: ClassVar[bool] = False

    def array_suffix(self, name: str) -> str:
        """Return the suffix of the member that holds an array: `KEY.npy` holds the array npy."""
        return name if name == "npy" else f"{name}.npy"


class IndexedTar(JsonRecord):
    """One tar of a list; `url`, `nsamples` and `filesize` have the names that wids reads.

    Attributes:
        url: `../` and the name of the tar, as it is beside the directory of the list.
        nsamples: Samples in the tar.
        filesize: Bytes of the tar.
        sha256: Hash of the tar.
        index_file: Size and hash of its index.
        suffixes: Suffixes of its members, sorted.
        arrays: The `.npy` members that all its samples have in one dtype and shape.
    """

    url: Annotated[str, Field(pattern=r"^\.\./[^/]+\.tar$")]
    nsamples: Count
    filesize: Count
    sha256: Sha256
    index_file: FileInfo
    suffixes: tuple[str, ...]
    arrays: dict[str, ArrayInfo]

    @property
    def name(self) -> str:
        """Name of the tar without `.tar`."""
        return self.tar_name.removesuffix(".tar")

    @property
    def tar_name(self) -> str:
        """Name of the tar."""
        return self.url.removeprefix("../")

    @property
    def index_name(self) -> str:
        """Name of its index."""
        return index_name(self.tar_name)

    @property
    def tar(self) -> FileInfo:
        """Size and hash of the tar."""
        return FileInfo(size_bytes=self.filesize, sha256=self.sha256)

    @property
    def num_samples(self) -> int:
        """Samples in the tar."""
        return self.nsamples

    @property
    def layout(self) -> TarLayout:
        """The members that its samples may have."""
        return TarLayout(self.suffixes)

    @model_validator(mode="after")
    def _check(self) -> IndexedTar:
        for name, array in self.arrays.items():
            if array.dtype not in ARRAY_DTYPES:
                raise ValueError(f"array {name} has dtype {array.dtype}")
            if self.layout.array_suffix(name) not in self.suffixes:
                raise ValueError(f"array {name} is not among the suffixes")
        return self


class TarSet(JsonRecord):
    """The tars of a directory, as `d2i index` found them.

    Attributes:
        wids_version: Version of the list's format in wids.
        shardlist: The tars, sorted by name.
    """

    wids_version: Literal[1] = 1
    shardlist: tuple[IndexedTar, ...]

    @property
    def shards(self) -> tuple[IndexedTar, ...]:
        """The tars, sorted by name."""
        return self.shardlist

    @property
    def num_samples(self) -> int:
        """Samples over all tars."""
        return sum(tar.nsamples for tar in self.shardlist)

    @property
    def size_bytes(self) -> int:
        """Bytes of all tars."""
        return sum(tar.filesize for tar in self.shardlist)

    @property
    def arrays(self) -> Mapping[str, ArrayInfo]:
        """The `.npy` members that all samples of all tars have in one dtype and shape."""
        return common_arrays([tar.arrays for tar in self.shardlist if tar.nsamples])

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Suffixes of the members of all tars, sorted."""
        return tuple(sorted({suffix for tar in self.shardlist for suffix in tar.suffixes}))

    @model_validator(mode="after")
    def _check(self) -> TarSet:
        names = [tar.tar_name for tar in self.shardlist]
        if names != sorted(set(names)):
            raise ValueError("the tars are not sorted by name")
        return self


def common_arrays(of_each: Sequence[Mapping[str, ArrayInfo]]) -> dict[str, ArrayInfo]:
    """Return the arrays that are in all of some descriptions, with the same dtype and shape."""
    first, *others = of_each or ({},)
    return {
        name: array
        for name, array in sorted(first.items())
        if all(other.get(name) == array for other in others)
    }


def index_name(tar_name: str) -> str:
    """Return the name of the index of a tar, relative to the directory of the tar."""
    return f"{INDEX_DIRECTORY}/{tar_name.removesuffix('.tar')}.arrow"


def is_tar_name(name: str) -> bool:
    """Return whether a file is named like a tar; `d2i index` refuses `.TAR`, to not skip it."""
    return name.lower().endswith(".tar") and len(name) > len(".tar")


def list_url(url: str) -> str:
    """Return the URL of the list of a directory's tars."""
    return storage.join(url, INDEX_DIRECTORY, LIST_NAME)


def read_tar_set(url: str) -> TarSet:
    """Read the list of a directory's tars, and check it against the sha256 beside it.

    Raises:
        FileNotFoundError: If there is none.
        ShardError: If it is damaged.
    """
    data = checksums.read_bytes(
        list_url(url), next_step=f"run `d2i index {url}` again", error=ShardError
    )
    return parse_record(TarSet, data, list_url(url))
