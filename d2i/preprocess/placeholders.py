"""Placeholder images: hosts send one image under many URLs in place of images that are gone.

Within a shard a placeholder is rejected before it is encoded. Across the shards of a split it is
found in the ledger at the end, and retracted from the committed shards: the same instances are
dropped whichever shard was made first. A finished data set is not changed.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from d2i.cluster import JobFault
from d2i.io import storage
from d2i.preprocess.ledger import (
    LedgerRow,
    count_failures,
    ledger_tables,
    read_shard_ledger,
    write_ledger,
)
from d2i.preprocess.plan.hash_partition import HashPartitions
from d2i.preprocess.workers.messages import FetchedImage
from d2i.shards import Commit, committed_names, copied_samples, read_commits, write_shard

REASON = "placeholder"
_HASH = "sha256_hash"


def refuse_placeholders(
    found: Iterable[FetchedImage], known: Set[str], num_same: int
) -> list[FetchedImage]:
    """Reject images that are identical under many URLs.

    Args:
        found: The distinct images of one shard.
        known: sha256 of placeholders found before.
        num_same: Number of URLs from which on an image is a placeholder; 0: it never is.
    """
    images = list(found)
    counts = Counter(p.image.sha256 for p in images if p.image and _was_requested(p))
    refused = known | {sha256 for sha256, num in counts.items() if 0 < num_same <= num}
    return [
        _refused(p) if p.image and p.image.sha256 in refused and _was_requested(p) else p
        for p in images
    ]


def placeholders_of(split_url: str, num_same: int) -> frozenset[str]:
    """Return the sha256 of the images that a split's ledger holds under many URLs.

    They are counted one hash partition at a time, as all images of a split may not fit in memory.
    """
    if not num_same:
        return frozenset()
    found: set[str] = set()
    with tempfile.TemporaryDirectory(prefix="d2i-same-") as scratch:
        with HashPartitions(Path(scratch) / "pictures.arrow", _HASH) as partitions:
            columns = ["sha256", "image", "final_url"]
            for _, table in ledger_tables(split_url, columns, shards=committed_names(split_url)):
                partitions.add(_requested_images(table))
        for part in partitions.buckets():
            counts = part.group_by("sha256").aggregate([("image", "count_distinct")])
            many = counts.filter(pc.greater_equal(counts["image_count_distinct"], num_same))
            found.update(many["sha256"].to_pylist())
    return frozenset(found)


@dataclass(frozen=True)
class Retraction:
    """A committed shard that holds placeholders."""

    split_url: str
    commit: Commit
    placeholders: frozenset[str]


def plan_retractions(split_url: str, num_same: int) -> list[Retraction]:
    """Return the committed shards that hold placeholders."""
    placeholders = placeholders_of(split_url, num_same)
    if not placeholders:
        return []
    commits = {commit.index: commit for commit in read_commits(split_url)}
    columns = ["status", "final_url", "sha256"]
    return [
        Retraction(split_url, commits[number], placeholders)
        for number, table in ledger_tables(split_url, columns, shards=commits)
        if _has_retracted(table, placeholders)
    ]


@dataclass(frozen=True)
class RetractionWorker:
    """Rewrites a committed shard without its placeholders; every other byte stays.

    Args:
        fingerprint: Of the data set.
        fault: Fault injection, which has the point `same_pictures.record_removed`.
    """

    fingerprint: Mapping[str, Any]
    fault: JobFault | None = None

    def run(self, task: Retraction) -> int:
        """Rewrite the shard, and return the number of retracted samples.

        A repeat after a kill at any point ends in the same state: the new commit record is written
        before the old one is removed, and the ledger, which has the retractions, after both.
        """
        split_url, old = task.split_url, task.commit
        rows = read_shard_ledger(split_url, old.index)
        retracted = {row.key for row in rows if _is_retracted(row, task.placeholders)}
        if retracted:
            rows = [_retracted(row) if row.key in retracted else row for row in rows]
            samples = copied_samples(split_url, old)
            new = write_shard(
                (sample for sample in samples if sample.key not in retracted),
                split_url,
                old.index,
                failures=count_failures(rows),
                fingerprint=self.fingerprint,
            )
            if new.name == old.name:
                # An earlier attempt got this far; only the ledger is left to write.
                write_ledger(split_url, old.index, rows)
                return len(retracted)
            storage.remove(storage.join(split_url, old.commit_name))
            if self.fault:
                self.fault.trigger_at("same_pictures.record_removed")
            write_ledger(split_url, old.index, rows)
        for name in (old.index_name, old.tar_name):
            storage.remove(storage.join(split_url, name))
        return len(retracted)


def _requested_images(ledger: pa.Table) -> pa.Table:
    """Return sha256 and URL of the images that came from one, with the hash to partition by."""
    came = pc.and_(pc.is_valid(ledger["sha256"]), pc.is_valid(ledger["final_url"]))
    images = ledger.filter(came).select(["sha256", "image"])
    digits = pc.utf8_slice_codeunits(images["sha256"], 0, 16).to_pylist()
    hashes = np.frombuffer(bytes.fromhex("".join(digits)), ">u8").astype(np.uint64)
    return images.append_column(_HASH, pa.array(hashes, pa.uint64()))


def _was_requested(found: FetchedImage) -> bool:
    """Return whether an image came from a URL: equal local files are the user's own choice."""
    return found.fetched.final_url is not None


def _has_retracted(ledger: pa.Table, placeholders: Set[str]) -> bool:
    """Return whether `_is_retracted` is true of any row."""
    known = pa.array(sorted(placeholders), pa.string())
    was_written = pc.and_(pc.equal(ledger["status"], "ok"), pc.is_valid(ledger["final_url"]))
    is_known = pc.is_in(ledger["sha256"], value_set=known)
    return bool(pc.any(pc.and_(was_written, is_known)).as_py())


def _is_retracted(row: LedgerRow, placeholders: Set[str]) -> bool:
    return row.status == "ok" and row.final_url is not None and row.sha256 in placeholders


def _refused(found: FetchedImage) -> FetchedImage:
    return replace(found, fetched=replace(found.fetched, reason=REASON, detail=_DETAIL))


def _retracted(row: LedgerRow) -> LedgerRow:
    return replace(row, status="permanent", reason=REASON, detail=_DETAIL)


_DETAIL = "the same image is served under many URLs"
