"""The manifest: a data set's commit records merged in index order, with a sha256 beside it.

Holds no time, attempt or path, so two finished jobs over the same inputs write the same bytes. Must
not import torch or ray.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, cast

from pydantic import Field, JsonValue, model_validator

from d2i.errors import ShardError
from d2i.fault_injection import Point
from d2i.io import storage
from d2i.io.checksums import checksum_line, sha256_of
from d2i.shards.commit import (
    COMMIT_SUFFIX,
    Arrays,
    Commit,
    Count,
    FileInfo,
    JsonRecord,
    canonical_json,
    committed_names,
    fingerprint_sha256,
    parse_record,
    read_commits,
)
from d2i.shards.layout import (
    FORMAT_1,
    DeclaredLayout,
    FormatVersion,
    Layout,
    layout_of,
    layout_of_fingerprint,
)
from d2i.shards.writer import file_info

MANIFEST_NAME = "manifest.json"
CHECKSUM_NAME = "manifest.json.sha256"
EMPTY_NAMES = {"empty_tokens.npy": "tokens", "empty_text.npy": "text"}
"""The files with the features of the empty text, and the array member that each stands in for."""
SHARD_SUFFIXES = (".tar", ".arrow", COMMIT_SUFFIX)
_SHARD_FILE = re.compile(r"\d{6}-[0-9a-f]{16}(\.tar|\.arrow|\.commit\.json)")


class Manifest(JsonRecord):
    """The content of a data set.

    Attributes:
        format: Version of the data set's format.
        fingerprint: Everything that determines the bytes, in nested fields; in format 2 it declares
            the arrays.
        num_samples: Samples over all shards.
        size_bytes: Bytes of all tars.
        failures: Instances without a sample, by reason class.
        arrays: Dtype and shape of each array member, in format 2 with its encoder; in format 1
            empty if there is no sample.
        files: In format 1: size and sha256 of the features of the empty text, by file name.
        shards: The commit records, in index order.
    """

    format: FormatVersion = 1
    fingerprint: dict[str, JsonValue]
    num_samples: Count
    size_bytes: Count
    failures: dict[str, Count]
    arrays: Arrays
    files: dict[Literal["empty_tokens.npy", "empty_text.npy"], FileInfo] = Field(
        default_factory=dict
    )
    shards: tuple[Commit, ...]

    def to_bytes(self) -> bytes:
        """Encode as canonical JSON, shard by shard: all at once takes ten times the memory."""
        left_out = {"shards"} if self.format == 1 else {"shards", "files"}
        rest = canonical_json(self.model_dump(mode="json", exclude=left_out) | {"shards": []})
        if not self.shards:
            return rest
        # The last `[]` is that of the shards, whatever the fingerprint holds: only a size follows.
        before, _, after = rest.rpartition(b"[]")
        records = (shard.to_bytes().rstrip().replace(b"\n", b"\n  ") for shard in self.shards)
        return b"".join((before, b"[\n  ", b",\n  ".join(records), b"\n ]", after))

    @property
    def layout(self) -> Layout:
        """The members that its samples may have."""
        return layout_of(self.format, self.arrays)

    @property
    def sha256(self) -> str:
        """Hash of `manifest.json`: the identity of the data set."""
        return sha256_of(self.to_bytes())

    @model_validator(mode="after")
    def _check(self) -> Manifest:
        layout = layout_of_fingerprint(self.fingerprint)
        if layout.format != self.format:
            raise ShardError(f"its fingerprint is that of format {layout.format}")
        counted = _totals(self.shards, layout)
        if counted != (self.num_samples, self.size_bytes, self.failures, self.arrays):
            raise ShardError("the totals do not match the shards")
        if any(a.index >= b.index for a, b in zip(self.shards, self.shards[1:], strict=False)):
            raise ShardError("the shards are not in index order")
        return self


def write_manifest(
    out_url: str,
    fingerprint: Mapping[str, Any],
    *,
    fault: Callable[[Point], None] | None = None,
) -> Manifest:
    """Merge the commits of a finished data set into its manifest, and publish it.

    In format 1 it includes the features of the empty text (`EMPTY_NAMES`) that lie beside the
    shards. Called again on the same files, it writes nothing.

    Args:
        out_url: The data set's directory.
        fingerprint: Everything that determines the bytes, as nested JSON values.
        fault: Called at the fault points `manifest.checksum` and `manifest.written`.

    Returns:
        The manifest, as written.

    Raises:
        ShardError: If a record is damaged, or shards disagree in arrays or in fingerprint.
    """
    manifest = merge_commits(out_url, fingerprint, read_commits(out_url))
    publish_manifest(out_url, manifest, fault=fault)
    return manifest


def publish_manifest(
    out_url: str, manifest: Manifest, *, fault: Callable[[Point], None] | None = None
) -> None:
    """Write a manifest and its checksum, unless they are already there."""
    trigger_at = fault or (lambda _point: None)
    data = manifest.to_bytes()
    # The checksum first: a manifest always has its checksum, except while it is replaced.
    _write_if_changed(storage.join(out_url, CHECKSUM_NAME), _checksum_line(data))
    trigger_at("manifest.checksum")
    _write_if_changed(storage.join(out_url, MANIFEST_NAME), data)
    trigger_at("manifest.written")


def read_manifest(url: str) -> Manifest:
    """Read a data set's manifest, and check it against the sha256 beside it.

    Raises:
        ShardError: If it is missing or damaged.
    """
    manifest_url = storage.join(url, MANIFEST_NAME)
    try:
        data = storage.read_bytes(manifest_url)
        checksum = storage.read_bytes(storage.join(url, CHECKSUM_NAME))
    except FileNotFoundError as err:
        raise ShardError(
            f"{url} has no {MANIFEST_NAME} with its sha256; expected a finished data set: "
            "run the same `d2i preprocess` command again to finish it"
        ) from err
    if checksum != _checksum_line(data):
        raise ShardError(
            f"{manifest_url} does not match the sha256 beside it; run the same `d2i preprocess` "
            "command again"
        )
    return parse_record(Manifest, data, manifest_url)


def has_valid_checksum(url: str, manifest: Manifest) -> bool:
    """Return whether a manifest matches the stored manifest or the stored checksum."""
    data = manifest.to_bytes()
    places = ((MANIFEST_NAME, data), (CHECKSUM_NAME, _checksum_line(data)))
    return any(_holds(storage.join(url, name), expected) for name, expected in places)


def matches_checksum_file(url: str, manifest: Manifest) -> bool | None:
    """Return whether a manifest matches the stored checksum; None if that cannot be read.

    A checksum with a few wrong digits still counts: two unrelated hashes agree in one digit of
    sixteen, and never in half of them.
    """
    try:
        found = storage.read_bytes(storage.join(url, CHECKSUM_NAME))
    except OSError:
        return None
    expected = _checksum_line(manifest.to_bytes())
    if re.fullmatch(rb"[0-9a-f]{64}" + re.escape(expected[64:]), found) is None:
        return None
    return 2 * sum(a == b for a, b in zip(found[:64], expected[:64], strict=True)) > 64


def listed_names(manifest: Manifest) -> set[str]:
    """Return the name of every file in a data set's directory, except `plan/` and `ledger/`."""
    names = {MANIFEST_NAME, CHECKSUM_NAME, *manifest.files}
    for shard in manifest.shards:
        names |= {shard.tar_name, shard.index_name, shard.commit_name}
    return names


def remove_manifest(out_url: str) -> None:
    """Unpublish a data set; its shards stay."""
    for name in (MANIFEST_NAME, CHECKSUM_NAME):
        storage.remove(storage.join(out_url, name))


def remove_uncommitted(out_url: str) -> list[str]:
    """Remove what killed attempts left: temporary files, and shard files without a commit.

    Call it only while nothing else writes to the data set, before `write_manifest`.

    Returns:
        The names removed.
    """
    storage.remove_temp_files(out_url)
    return remove_other_shards(out_url, committed_names(out_url).values())


def remove_other_shards(out_url: str, shard_names: Iterable[str]) -> list[str]:
    """Remove the files of all shards but these; files with other names stay.

    Returns:
        The names removed.
    """
    stray = other_shard_files(out_url, shard_names)
    # Commit records first, so that no record is ever left without its tar.
    for name in sorted(stray, key=lambda name: not name.endswith(COMMIT_SUFFIX)):
        storage.remove(storage.join(out_url, name))
    return stray


def other_shard_files(out_url: str, shard_names: Iterable[str]) -> list[str]:
    """Return the names of the files of all shards but these."""
    kept = {name + suffix for name in shard_names for suffix in SHARD_SUFFIXES}
    found = [name for name in storage.list_names(out_url) if _SHARD_FILE.fullmatch(name)]
    return [name for name in found if name not in kept]


def merge_commits(
    out_url: str, fingerprint: Mapping[str, Any], commits: Iterable[Commit]
) -> Manifest:
    """Return the manifest of some commits, given in index order; write nothing.

    Raises:
        ShardError: If shards disagree in arrays or in fingerprint.
    """
    shards = tuple(commits)
    _check_fingerprints(shards, fingerprint)
    layout = layout_of_fingerprint(fingerprint)
    num_samples, size_bytes, failures, arrays = _totals(shards, layout)
    return Manifest(
        format=layout.format,
        fingerprint=json.loads(canonical_json(fingerprint)),
        num_samples=num_samples,
        size_bytes=size_bytes,
        failures=failures,
        arrays=arrays,
        files=cast("Any", dict(_empty_files(out_url)) if layout is FORMAT_1 else {}),
        shards=shards,
    )


def _totals(shards: Sequence[Commit], layout: Layout) -> tuple[int, int, dict[str, int], Arrays]:
    """Sum the commits: samples, bytes of the tars, failures by reason, the arrays they share."""
    failures: Counter[str] = Counter()
    arrays: Arrays | None = dict(layout.declared) if isinstance(layout, DeclaredLayout) else None
    for shard in shards:
        failures.update(shard.failures)
        if shard.format != layout.format:
            raise ShardError(
                f"shard {shard.name} has format {shard.format}; expected {layout.format}, as the "
                "fingerprint says"
            )
        if shard.num_samples or shard.format == 2:
            if arrays not in (None, shard.arrays):
                raise ShardError(
                    f"shard {shard.name} has arrays {shard.arrays}; those before it have {arrays}: "
                    "they were made with other settings"
                )
            arrays = shard.arrays
    return (
        sum(shard.num_samples for shard in shards),
        sum(shard.tar.size_bytes for shard in shards),
        {reason: count for reason, count in sorted(failures.items()) if count},
        arrays or {},
    )


def _check_fingerprints(shards: Sequence[Commit], fingerprint: Mapping[str, Any]) -> None:
    expected = fingerprint_sha256(fingerprint)
    for shard in shards:
        if shard.fingerprint_sha256 not in (None, expected):
            raise ShardError(
                f"shard {shard.name} was made under another fingerprint than {expected[:16]}; "
                "remove it or choose another --out"
            )


def _empty_files(out_url: str) -> Iterator[tuple[str, FileInfo]]:
    for name in EMPTY_NAMES:
        url = storage.join(out_url, name)
        if storage.exists(url):
            data = storage.read_bytes(url)
            FORMAT_1.check_array(EMPTY_NAMES[name], data)
            yield name, file_info(data)


def _checksum_line(data: bytes) -> bytes:
    return checksum_line(sha256_of(data), MANIFEST_NAME)


def _write_if_changed(url: str, data: bytes) -> None:
    if not _holds(url, data):
        storage.write_bytes(url, data)


def _holds(url: str, data: bytes) -> bool:
    return storage.exists(url) and storage.read_bytes(url) == data
