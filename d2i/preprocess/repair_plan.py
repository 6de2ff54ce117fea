"""Plan of a repair: what to fetch and encode, by manifest, records, indexes and ledger."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from d2i.errors import ShardError
from d2i.io import storage
from d2i.preprocess.job_files import JobFiles
from d2i.preprocess.workers.repair_worker import RepairTask
from d2i.shards import Commit, RecoveryInputs, broken_keys, rebuild_commit
from d2i.shards.commit import fingerprint_sha256


def lost_records(
    job: JobFiles, evidence: RecoveryInputs, fingerprint: Mapping[str, object] | None
) -> dict[int, Commit]:
    """Rebuild commit records from tar and ledger that neither the manifest nor a file has.

    Returns:
        The records written, by shard number.
    """
    found: dict[int, Commit] = {}
    for index in unknown_shards(job, evidence, evidence.commits) if fingerprint else ():
        failures = job.failures(index)
        for name in storage.list_names(job.split_url) if failures is not None else ():
            if name.startswith(f"{index:06d}-") and name.endswith(".tar") and index not in found:
                commit = _rebuilt(job.split_url, name, failures or {}, fingerprint or {})
                if commit is not None:
                    found[index] = commit
    return found


def unknown_shards(
    job: JobFiles, evidence: RecoveryInputs, commits: Mapping[int, Commit]
) -> Iterable[int]:
    """Return the numbers of expected shards without a commit record; none with a manifest."""
    if evidence.manifest:
        return []
    return [index for index in job.indexes() if index not in commits]


def broken_tasks(job: JobFiles, broken: Iterable[Commit]) -> Iterator[RepairTask]:
    """Yield the repair of each broken shard whose record is known: only its lost samples."""
    for commit in broken:
        keys = broken_keys(job.split_url, commit)
        if keys is None:
            keys = job.written_keys(commit.index)
        yield RepairTask(
            job.split_url,
            commit.index,
            keys=keys,
            failures=commit.failures,
            commit=commit,
            records_sha256=job.records_sha256(commit.index),
        )


def unknown_task(job: JobFiles, index: int) -> RepairTask | None:
    """Return the repair of a shard without record and tar from the ledger; None if that is lost."""
    keys, failures = job.written_keys(index), job.failures(index)
    if keys is None or failures is None:
        return None
    sha256 = job.records_sha256(index)
    return RepairTask(job.split_url, index, keys=keys, failures=failures, records_sha256=sha256)


def _rebuilt(
    url: str, tar_name: str, failures: Mapping[str, int], fingerprint: Mapping[str, object]
) -> Commit | None:
    try:
        return rebuild_commit(
            url,
            tar_name,
            failures=failures,
            fingerprint_sha256=fingerprint_sha256(fingerprint),
        )
    except (OSError, ShardError):
        return None
