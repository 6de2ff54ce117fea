"""Mend a data set from what of it is intact, without fetching or encoding anything.

The manifest tells what every shard was, or else the commit records do. A tar that is whole gives
its index and its record back; a damaged tar of which every sample is whole is framed anew. What is
left must be made again. Must not import torch or ray.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from d2i import storage
from d2i.errors import ShardError
from d2i.shards.commit import COMMIT_SUFFIX, Commit, FileInfo, parse_record
from d2i.shards.copy import intact_samples, trusted_index
from d2i.shards.manifest import Manifest, read_manifest
from d2i.shards.rebuild import rebuild_index
from d2i.shards.write import streamed_info, write_shard


@dataclass(frozen=True)
class Evidence:
    """What is known of the shards that a data set should have.

    Attributes:
        manifest: Where it and its checksum are whole.
        commits: What each shard was, by its number: from the manifest, else from its record.
    """

    manifest: Manifest | None
    commits: dict[int, Commit]


def find_evidence(url: str) -> Evidence:
    """Read what the manifest and the commit records still tell; what is damaged tells nothing."""
    commits: dict[int, Commit] = {}
    for name in storage.list_names(url):
        if name.endswith(COMMIT_SUFFIX):
            commit = _read_record(url, name)
            if commit is not None:
                commits.setdefault(commit.index, commit)
    try:
        manifest = read_manifest(url)
    except (OSError, ShardError):
        return Evidence(None, commits)
    return Evidence(manifest, commits | {shard.index: shard for shard in manifest.shards})


@dataclass(frozen=True)
class Mended:
    """What was mended, and what could not be.

    Attributes:
        files: Names of the files that were written again.
        broken: The shards whose tar must be made again.
    """

    files: tuple[str, ...]
    broken: tuple[Commit, ...]


def mend(
    url: str,
    commits: Iterable[Commit],
    fingerprint: Mapping[str, Any] | None,
    *,
    num_workers: int = 4,
) -> Mended:
    """Restore every record and index, and every tar whose samples are whole.

    Args:
        url: The data set's folder; nothing else may write there.
        commits: What its shards were.
        fingerprint: What the shards were made under, where it is known.
        num_workers: Shards looked at once.

    Raises:
        ShardError: If an index cannot be restored to the bytes it had.
    """
    known = list(commits)
    with ThreadPoolExecutor(num_workers) as pool:
        tars = _tars(url, pool)
        restored = _put_back(url, known, tars)
        whole = {c.name for c in known if tars.get(c.tar_name) == c.tar or c.tar_name in restored}
        mender = _Mender(url, fingerprint)
        results = list(pool.map(lambda c: mender.mend_shard(c, is_whole=c.name in whole), known))
    files = [*restored, *(name for names, _ in results for name in names)]
    broken = [commit for commit, (_, is_whole) in zip(known, results, strict=True) if not is_whole]
    return Mended(tuple(sorted(files)), tuple(broken))


def broken_keys(url: str, commit: Commit) -> frozenset[str] | None:
    """Return the keys of the samples that a damaged shard lost; None where nothing tells them."""
    try:
        keys = trusted_index(url, commit).keys.to_pylist()
    except (OSError, ShardError):
        return None
    return frozenset(keys) - {sample.key for sample in intact_samples(url, commit)}


@dataclass(frozen=True)
class _Mender:
    url: str
    fingerprint: Mapping[str, Any] | None

    def mend_shard(self, commit: Commit, *, is_whole: bool) -> tuple[list[str], bool]:
        """Return the files that were restored, and whether the tar is whole now."""
        restored = []
        if not _holds(self.url, commit.commit_name, commit.to_bytes()):
            storage.write_bytes(storage.join(self.url, commit.commit_name), commit.to_bytes())
            restored.append(commit.commit_name)
        if not is_whole:
            if not self._frame_anew(commit):
                return restored, False
            restored.append(commit.tar_name)
        if _info(self.url, commit.index_name) != commit.index_file:
            rebuild_index(self.url, commit)
            restored.append(commit.index_name)
        return restored, True

    def _frame_anew(self, commit: Commit) -> bool:
        """Write the tar again where all of its samples are whole."""
        try:
            write_shard(
                intact_samples(self.url, commit),
                self.url,
                commit.index,
                failures=commit.failures,
                fingerprint=self.fingerprint if commit.fingerprint_sha256 else None,
                expected=commit,
            )
        except ShardError:
            return False
        return True


def _tars(url: str, pool: ThreadPoolExecutor) -> dict[str, FileInfo]:
    """Give size and sha256 of every tar that can be read, by name."""
    names = [name for name in storage.list_names(url) if name.endswith(".tar")]
    infos = zip(names, pool.map(lambda name: _info(url, name), names), strict=True)
    return {name: info for name, info in infos if info is not None}


def _put_back(url: str, commits: list[Commit], tars: Mapping[str, FileInfo]) -> list[str]:
    """Give the tars that lie under another's name their own again."""
    places = {info: name for name, info in tars.items()}
    lost = [c for c in commits if tars.get(c.tar_name) != c.tar and c.tar in places]
    with ExitStack() as stack:
        # All are copied before any is put back: two may have each other's name.
        copies = [(stack.enter_context(storage.scratch_file(url)), c) for c in lost]
        for path, commit in copies:
            storage.fetch_file(storage.join(url, places[commit.tar]), path)
        for path, commit in copies:
            storage.publish_file(path, storage.join(url, commit.tar_name))
    return [commit.tar_name for commit in lost]


def _read_record(url: str, name: str) -> Commit | None:
    place = storage.join(url, name)
    try:
        commit = parse_record(Commit, storage.read_bytes(place), place)
    except (OSError, ShardError):
        return None
    return commit if commit.commit_name == name else None


def _holds(url: str, name: str, expected: bytes) -> bool:
    try:
        return storage.read_bytes(storage.join(url, name)) == expected
    except OSError:
        return False


def _info(url: str, name: str) -> FileInfo | None:
    try:
        with storage.open_url(storage.join(url, name)) as file:
            return streamed_info(file)
    except OSError:
        return None
