"""The commit record of a shard: written last, so that a shard exists once its record does.

Owns the names of a shard's files and the JSON form of records. Must not import torch or ray.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from d2i.errors import ShardError
from d2i.io import storage
from d2i.shards.layout import ArrayInfo, DeclaredArray, FormatVersion, Layout, layout_of

COMMIT_SUFFIX = ".commit.json"
_SHARD_NAME = re.compile(r"\d{6}-[0-9a-f]{16}")

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0)]


class JsonRecord(BaseModel):
    """A frozen record with canonical bytes: equal records have equal `to_bytes`."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    def to_bytes(self) -> bytes:
        """Encode as canonical JSON."""
        return canonical_json(self.model_dump(mode="json"))


Record = TypeVar("Record", bound=JsonRecord)


class FileInfo(JsonRecord):
    """Size and sha256 of a file."""

    size_bytes: Count
    sha256: Sha256


Arrays = dict[str, DeclaredArray | ArrayInfo]


def _the_same(arrays: Arrays) -> Arrays:
    """Return one shared object for equal arrays: all shards of a data set have the same."""
    return _only_arrays(tuple(arrays.items()))


@lru_cache(maxsize=64)
def _only_arrays(items: tuple[tuple[Any, ArrayInfo], ...]) -> Arrays:
    return dict(items)


class Commit(JsonRecord):
    """The content of one shard.

    Attributes:
        format: Version of the data set's format.
        name: `{index:06d}-{first 16 hex digits of the tar's sha256}`.
        index: Number of the shard in the plan.
        num_samples: Samples in the tar; 0 if every instance failed.
        failures: Number of instances without a sample, by reason class.
        fingerprint_sha256: Hash of the fingerprint the shard was made under; in format 1 None if
            none was given.
        tar: Size and hash of `{name}.tar`.
        index_file: Size and hash of `{name}.arrow`.
        arrays: Dtype and shape of each array member, in format 2 with its encoder; in format 1
            empty if there is no sample.
    """

    format: FormatVersion = 1
    name: str
    index: Annotated[int, Field(ge=0, le=999_999)]
    num_samples: Count
    failures: dict[str, int]
    fingerprint_sha256: Sha256 | None = None
    tar: FileInfo
    index_file: FileInfo
    arrays: Annotated[Arrays, AfterValidator(_the_same)]

    @property
    def layout(self) -> Layout:
        """The members that its samples may have."""
        return layout_of(self.format, self.arrays)

    @property
    def tar_name(self) -> str:
        """File name of the tar."""
        return f"{self.name}.tar"

    @property
    def index_name(self) -> str:
        """File name of the index."""
        return f"{self.name}.arrow"

    @property
    def commit_name(self) -> str:
        """File name of this record."""
        return f"{self.name}{COMMIT_SUFFIX}"

    @model_validator(mode="after")
    def _check(self) -> Commit:
        expected = shard_name(self.index, self.tar.sha256)
        if self.name != expected:
            raise ValueError(f"a shard of this index and sha256 is named {expected}")
        layout_of(self.format, self.arrays)
        if self.format == 2 and self.fingerprint_sha256 is None:
            raise ValueError("in format 2 it has the fingerprint_sha256, too")
        return self


def shard_name(index: int, tar_sha256: str) -> str:
    """Return the name of a shard, from its number in the plan and its content."""
    return f"{index:06d}-{tar_sha256[:16]}"


def canonical_json(value: Any) -> bytes:
    """Encode canonical JSON: sorted keys, ASCII, one value per line, newline at the end."""
    return (json.dumps(value, sort_keys=True, indent=1, allow_nan=False) + "\n").encode()


def fingerprint_sha256(fingerprint: Mapping[str, Any]) -> str:
    """Hash a fingerprint, independent of the order of its fields."""
    return hashlib.sha256(canonical_json(fingerprint)).hexdigest()


def parse_record(kind: type[Record], data: bytes, url: str) -> Record:
    """Decode a record, and reject any bytes but its canonical form.

    Raises:
        ShardError: If the bytes are not the canonical form of such a record.
    """
    try:
        record = kind.model_validate_json(data)
        is_canonical = record.to_bytes() == data
    except ValidationError as err:
        problem = err.errors()[0]
        place = ".".join(str(part) for part in problem["loc"]) or "the whole record"
        raise ShardError(f"{url} is not a {kind.__name__}: {place}: {problem['msg']}") from err
    except (ShardError, ValueError) as err:
        # JSON has no form for NaN and infinity.
        raise ShardError(f"{url} is not a {kind.__name__}: {err}") from err
    if not is_canonical:
        raise ShardError(
            f"{url} was changed: its JSON is not in the canonical form that d2i writes"
        )
    return record


def committed_names(out_url: str) -> dict[int, str]:
    """Return the names of committed shards by index, in its order, without reading the records.

    If two attempts at one shard both committed, with different bytes, the name that sorts first
    counts, so that every reader chooses the same one.

    Raises:
        ShardError: If the name of a record is not that of a shard.
    """
    names: dict[int, str] = {}
    for file_name in storage.list_names(out_url):
        if file_name.endswith(COMMIT_SUFFIX):
            name = file_name.removesuffix(COMMIT_SUFFIX)
            if _SHARD_NAME.fullmatch(name) is None:
                url = storage.join(out_url, file_name)
                raise ShardError(f"{url} is not the commit record of a shard; remove the file")
            names.setdefault(int(name[:6]), name)
    return names


def read_commits(out_url: str) -> list[Commit]:
    """Read the records of `committed_names`, in index order.

    Raises:
        ShardError: If a record is damaged. Remove that file and run the same command again.
    """
    names = committed_names(out_url).values()
    urls = [storage.join(out_url, name + COMMIT_SUFFIX) for name in names]
    commits = []
    for name, url, data in zip(names, urls, storage.read_each(urls), strict=True):
        commit = parse_record(Commit, data, url)
        if commit.name != name:
            raise ShardError(f"{url} holds the commit record of {commit.name}; remove the file")
        commits.append(commit)
    return commits
