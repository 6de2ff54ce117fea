"""Repair of broken or missing parts of prepared data, byte for byte.

The intact parts of a data set are used first (`d2i.shards.restore`); only lost samples are fetched
and encoded again, by the code path that made them. Only the original bytes are ever published under
a shard's name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from d2i.cluster import Session
from d2i.config import Recipe
from d2i.corpora.splits import source_directory
from d2i.errors import ConfigError, D2IError, ShardError
from d2i.fetch.sources import (
    PUBLIC_NETWORK,
    NetworkPolicy,
    shared_source,
)
from d2i.io import checksums, storage
from d2i.preprocess.job_files import JobFiles, lost_files
from d2i.preprocess.plan.planner import fingerprint_url
from d2i.preprocess.progress import Tally
from d2i.preprocess.workers.encode_worker import EncodeWorkerBuilder
from d2i.preprocess.workers.fetch_worker import FetchWorkerBuilder
from d2i.preprocess.workers.repair_worker import RepairTask, RepairWorkerBuilder
from d2i.recipes import change_recipe
from d2i.shards import (
    Commit,
    Manifest,
    RecoveryInputs,
    RestoreResult,
    ShardProblem,
    broken_keys,
    declares_arrays,
    find_data_sets,
    find_recovery_inputs,
    has_valid_checksum,
    is_indexed,
    matches_checksum_file,
    merge_commits,
    other_shard_files,
    publish_manifest,
    rebuild_commit,
    remove_other_shards,
    restore,
    verify,
)
from d2i.shards.commit import COMMIT_SUFFIX, canonical_json
from d2i.shards.manifest import CHECKSUM_NAME, MANIFEST_NAME
from d2i.shards.writer import file_info


@dataclass(frozen=True)
class RepairRequest:
    """One repair: of a directory that d2i preprocess made, or of one of its splits.

    Args:
        settings: Recipe settings for inputs that have moved since.
    """

    directory: str
    settings: Sequence[str] = ()


@dataclass(frozen=True)
class RepairSummary:
    """The outcome of the repair of one data set.

    Attributes:
        folder: Its directory.
        mended: Files that were restored from intact parts.
        made: Shards that were remade.
        problems: Problems left, as `verify` finds them; those beyond repair have the reason
            `repair`.
        notes: Lost job files beside the shards, and what the loss means; readers of the data do
            not need them.
    """

    folder: str
    mended: tuple[str, ...]
    made: tuple[str, ...]
    problems: tuple[ShardProblem, ...]
    notes: tuple[str, ...]


def repair(
    request: RepairRequest,
    session: Session,
    on_progress: Callable[[int, int], None] = lambda _done, _all: None,
    *,
    network_policy: NetworkPolicy = PUBLIC_NETWORK,
) -> list[RepairSummary]:
    """Repair every data set of a directory; leave intact ones unchanged.

    Args:
        request: The directory.
        session: Where the workers run.
        on_progress: Called with the number of shards done and their total, per data set.
        network_policy: The network settings of image requests.

    Raises:
        D2IError: If the user can fix the error; repairs so far are kept.
    """
    url = storage.resolve(request.directory)
    with storage.exclusive_lock(_root(url)):
        return [
            _RepairedSet(request, session, network_policy, data_set).repair(on_progress)
            for data_set in _repairable(url)
        ]


def _repairable(url: str) -> list[str]:
    """Return the data sets of a directory, all of which d2i must have made."""
    found = find_data_sets(url)
    indexed = [data_set for data_set in found if is_indexed(data_set)]
    if indexed:
        raise ConfigError(
            f"{indexed[0]} holds tars that d2i did not write, and cannot make again; expected data "
            "made by d2i preprocess; copy damaged tars again from their source"
        )
    return found


class _RepairedSet:
    """One data set under repair."""

    def __init__(
        self, request: RepairRequest, session: Session, network_policy: NetworkPolicy, url: str
    ) -> None:
        self.request, self.session, self.network_policy = request, session, network_policy
        self.url = url
        self.restored: list[str] = []
        self.made: list[str] = []
        self.problems: list[ShardProblem] = []
        self.job = self._kept_job()
        self.evidence = self._evidence()
        self.fingerprint = self._fingerprint()

    def repair(self, on_progress: Callable[[int, int], None]) -> RepairSummary:
        """Restore from intact parts, remake the rest, rebuild the manifest, and verify it all."""
        storage.remove_temp_files(self.url)
        commits = self._restore_records()
        restored = restore(self.url, commits.values(), self.fingerprint)
        self.restored += restored.files
        if self.job:
            self._make(self.job, self._tasks(self.job, commits, restored), commits, on_progress)
        if not self.problems and self._restore_manifest():
            storage.remove_temp_files(self.url)
            # The manifest now defines which shards do not belong here.
            remove_other_shards(self.url, (c.name for c in self._evidence().commits.values()))
        report = verify(self.url)
        problems = (*self.problems, *report.problems)
        notes = tuple(lost_files(self.url, sorted(commits)))
        return RepairSummary(
            self.url, tuple(sorted(self.restored)), tuple(self.made), problems, notes
        )

    def _kept_job(self) -> JobFiles | None:
        """Return the job files; None if they are lost, and only intact parts can be used."""
        try:
            return JobFiles(self.url)
        except D2IError as err:
            if storage.exists(storage.join(self.url, "plan")):
                self._add("plan", str(err))
            return None

    def _evidence(self) -> RecoveryInputs:
        """Return what is known of the shards, without those that do not belong to the manifest.

        Without a manifest none are excluded: the plan may have lost its supplements.
        """
        found = find_recovery_inputs(self.url)
        if found.manifest is None:
            return found
        belonging = {shard.index for shard in found.manifest.shards}
        # A supplement may be in progress.
        belonging |= {*self.job.indexes()} if self.job else set[int]()
        kept = {i: commit for i, commit in found.commits.items() if i in belonging}
        return RecoveryInputs(found.manifest, kept)

    def _fingerprint(self) -> dict[str, Any] | None:
        """Return the fingerprint of the shards, restored from the manifest if there is one."""
        manifest = self.evidence.manifest
        if manifest is None:
            return self.job.fingerprint() if self.job else None
        url, data = fingerprint_url(self.url), canonical_json(manifest.fingerprint)
        if self.job and self.job.fingerprint() != manifest.fingerprint:
            checksums.write_bytes(url, data)
        return dict(manifest.fingerprint)

    def _restore_records(self) -> dict[int, Commit]:
        if self.job is None:
            return self.evidence.commits
        lost = lost_records(self.job, self.evidence, self.fingerprint)
        self.restored += [name for c in lost.values() for name in (c.commit_name, c.index_name)]
        return self.evidence.commits | lost

    def _tasks(
        self, job: JobFiles, commits: dict[int, Commit], restored: RestoreResult
    ) -> list[RepairTask]:
        tasks = list(broken_tasks(job, restored.broken))
        for index in unknown_shards(job, self.evidence, commits):
            task = unknown_task(job, index)
            if task is None:
                detail = (
                    "its commit record is missing, and cannot be rebuilt: its ledger is missing or "
                    "damaged, or part of it was retried since; prepare the data again in another "
                    "directory"
                )
                self._add(f"{index:06d}{COMMIT_SUFFIX}", detail)
            else:
                tasks.append(task)
        return tasks

    def _make(
        self,
        job: JobFiles,
        tasks: list[RepairTask],
        commits: dict[int, Commit],
        on_progress: Callable[[int, int], None],
    ) -> None:
        """Remake shards, and the features of '' if they are not those of the manifest."""
        if not tasks and self._has_features(commits):
            return
        recipe = change_recipe(job.recipe(), self.request.settings)
        encoder = EncodeWorkerBuilder(recipe, (self.url,), self.session.job_fault)
        if not tasks:
            list(self.session.map(_FingerprintLock, [encoder]))
            return
        results = self.session.pipeline(
            self._fetcher(job, recipe), RepairWorkerBuilder(encoder), tasks
        )
        for done, (task, result) in enumerate(results, start=1):
            if result.problem is None:
                self.made.append(result.name)
            else:
                name = task.commit.tar_name if task.commit else f"{task.index:06d}.tar"
                self._add(name, result.problem)
            on_progress(done, len(tasks))

    def _fetcher(self, job: JobFiles, recipe: Recipe) -> FetchWorkerBuilder:
        root = recipe.corpus.image_root or source_directory(job.source())
        images = shared_source(root, recipe.fetch, self.network_policy, self.session)
        return FetchWorkerBuilder(
            images, recipe, self.session.shared(Tally()), self.session.job_fault
        )

    def _has_features(self, commits: dict[int, Commit]) -> bool:
        """Return whether the features of '' match the manifest, or a rebuilt one is valid.

        In format 2 there are none.
        """
        if self.evidence.manifest:
            return all(_is(self.url, n, i) for n, i in self.evidence.manifest.files.items())
        if self.fingerprint is not None and declares_arrays(self.fingerprint):
            return True
        if self.fingerprint is None or not commits:
            return False
        try:
            return has_valid_checksum(self.url, self._fold(self.fingerprint))
        except ShardError:
            return False

    def _restore_manifest(self) -> bool:
        """Rebuild the manifest if it was damaged; return whether there is one now."""
        if self.evidence.manifest:
            return True
        fingerprint = self.fingerprint or (self.job.fingerprint() if self.job else None)
        if fingerprint is None:
            detail = "the fingerprint of its shards is missing; expected plan/fingerprint.json"
            self._add(MANIFEST_NAME, detail)
            return False
        try:
            manifest = self._fold(fingerprint)
        except ShardError as err:
            self._add(MANIFEST_NAME, str(err))
            return False
        if not self._is_complete(manifest):
            return False
        publish_manifest(self.url, manifest)
        self.restored += [MANIFEST_NAME, CHECKSUM_NAME]
        return True

    def _fold(self, fingerprint: dict[str, Any]) -> Manifest:
        commits = self._evidence().commits
        return merge_commits(self.url, fingerprint, [commits[index] for index in sorted(commits)])

    def _is_complete(self, manifest: Manifest) -> bool:
        """Return whether a rebuilt manifest leaves out no shard that was there."""
        is_recorded = matches_checksum_file(self.url, manifest)
        if is_recorded is False:
            detail = (
                f"the manifest rebuilt from the remaining files does not match {CHECKSUM_NAME}: a "
                "shard may be missing with all its records; restore it from a copy, or prepare the "
                "data again"
            )
            self._add(MANIFEST_NAME, detail)
        elif is_recorded is None:
            detail = (
                "without its commit record or a manifest, it is unknown whether it belongs here; "
                "restore either from a copy, or remove the file"
            )
            for name in other_shard_files(self.url, (s.name for s in manifest.shards)):
                self._add(name, detail)
        return not self.problems

    def _add(self, file: str, detail: str) -> None:
        self.problems.append(ShardProblem(file, "repair", detail))


class _FingerprintLock:
    """Writes the features of '' and the fingerprint where they are missing or wrong."""

    def run(self, builder: EncodeWorkerBuilder) -> None:
        builder()


def _is(url: str, name: str, expected: object) -> bool:
    place = storage.join(url, name)
    return storage.exists(place) and file_info(storage.read_bytes(place)) == expected


def _root(directory: str) -> str:
    """Return the directory that one command locks: the root of splits prepared together."""
    is_root = storage.exists(storage.join(directory, "recipe.json"))
    return directory if is_root else directory.rpartition("/")[0] or directory


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
            fingerprint=fingerprint,
        )
    except (OSError, ShardError):
        return None
