"""The preprocessing job: plan every split, make the missing shards, merge commits into manifests.

A split without a single sample is not published: its shards are removed, its ledger stays, and
the next command starts it over.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from d2i.cluster import Session
from d2i.cluster.estimate import Throughput, Work, save_rate
from d2i.cluster.session import Unit
from d2i.config import Recipe
from d2i.corpora import canonical_split, found_splits
from d2i.corpora.splits import source_directory
from d2i.dialog import SPLITS
from d2i.encoders.available import check_present
from d2i.errors import ConfigError, DataError, ShardError
from d2i.fetch.downloads import check_downloads
from d2i.fetch.sources import (
    PUBLIC_NETWORK,
    ImageSource,
    NetworkPolicy,
    shared_source,
)
from d2i.images.image_files import check_root
from d2i.io import checksums, storage
from d2i.io.parse import read_json
from d2i.preprocess.ledger import commonest_failure, remove_ledgers
from d2i.preprocess.placeholders import RetractionWorker, placeholders_of, plan_retractions
from d2i.preprocess.plan.exclude import NOTHING, read_exclusion
from d2i.preprocess.plan.planner import Plan, PlanRequest, fingerprint_url, make_plan
from d2i.preprocess.plan.supplements import (
    Supplement,
    merge_ledgers,
    plan_retry_shards,
    read_supplements,
    remove_supplements,
)
from d2i.preprocess.progress import JobProgress, Tally
from d2i.preprocess.reuse import Reuse, plan_reuse
from d2i.preprocess.split_summary import SplitSummary, refuse_empty, split_summary
from d2i.preprocess.workers.encode_worker import EncodeWorkerBuilder, ImagePartWorker
from d2i.preprocess.workers.fetch_worker import FetchWorkerBuilder
from d2i.preprocess.workers.messages import ShardTask
from d2i.recipes import check_prepared_with, store_recipe
from d2i.shards import (
    committed_names,
    read_commits,
    read_manifest,
    remove_manifest,
    remove_other_shards,
    remove_uncommitted,
    write_manifest,
)
from d2i.shards.commit import canonical_json
from d2i.shards.manifest import EMPTY_NAMES, MANIFEST_NAME


@dataclass(frozen=True)
class PreprocessRequest:
    """One preprocessing job."""

    corpus: str
    source: str
    out: str
    recipe: Recipe
    split: str | None = None
    limit: int | None = None
    seed: int = 0
    exclude: str | None = None
    reuse: str | None = None


def plan_job(request: PreprocessRequest, *, keep: bool = True) -> dict[str, Plan]:
    """Plan every requested split; fetch nothing, and write nothing without `keep`.

    Raises:
        ConfigError: If the output directory was begun with other settings.
        DataError: If the corpus has no requested split, or if `corpus.image_root` or
            `fetch.downloads` is not a valid source of images.
    """
    found = found_splits(request.corpus, request.source, request.recipe.corpus.options())
    wanted = [canonical_split(request.split)] if request.split else found
    if not set(wanted) <= set(found):
        raise DataError(
            f"--split {request.split}: {request.source} has no such split of {request.corpus}; "
            f"expected {', '.join(found)}; check --corpus and --source"
        )
    _check_images(request, wanted)
    exclusion = NOTHING if request.exclude is None else read_exclusion(request.exclude)
    return {
        split: make_plan(
            PlanRequest(
                request.corpus,
                request.source,
                split,
                request.recipe,
                request.limit,
                request.seed,
                exclusion,
            ),
            storage.join(request.out, split),
            keep=keep,
        )
        for split in wanted
    }


def _check_images(request: PreprocessRequest, splits: list[str]) -> None:
    """Reject an invalid source of images, unless no image will be read from it any more."""
    recipe = request.recipe
    manifests = [storage.join(request.out, split, MANIFEST_NAME) for split in splits]
    if request.reuse is not None or all(map(storage.exists, manifests)):
        return
    if recipe.corpus.image_root is not None and recipe.fetch.mirror is None:
        check_root(recipe.corpus.image_root)
    if recipe.fetch.downloads is not None:
        check_downloads(recipe.fetch.downloads)


def work_left(request: PreprocessRequest, plans: dict[str, Plan]) -> Work:
    """Return the uncommitted work of some plans; write nothing."""
    num_shards = num_instances = 0
    for split, plan in plans.items():
        commits = read_commits(storage.join(request.out, split))
        num_shards += plan.num_shards - len({c.index for c in commits if c.index < plan.num_shards})
        done = sum(c.num_samples + sum(c.failures.values()) for c in commits)
        num_instances += plan.num_instances - done
    recipe = request.recipe
    pixels = recipe.preprocess.num_samples_per_shard * 3 * recipe.image.resolution**2
    # One shard is being fetched, one waits, one is being encoded; source bytes come on top.
    return Work(num_instances, num_shards, 3 * pixels)


def rate_decided_by(request: PreprocessRequest, unit: Unit) -> dict[str, Any]:
    """Return what determines the speed of a worker, as far as the request knows it."""
    recipe = request.recipe.model_dump(mode="json")
    parts = {name: recipe[name] for name in ("image", "text", "encoders")}
    return {"stage": "preprocess", "corpus": request.corpus, "unit": unit, **parts}


def preprocess(
    request: PreprocessRequest,
    session: Session,
    on_progress: Callable[[JobProgress], None],
    *,
    network_policy: NetworkPolicy = PUBLIC_NETWORK,
    retry_failed: bool = False,
) -> list[SplitSummary]:
    """Run the job; a repeated run makes only what is missing, if anything.

    Args:
        request: The job.
        session: Where its workers run.
        on_progress: Called about once a second, and after each shard.
        network_policy: The network settings of image requests.
        retry_failed: If nothing is missing, retry the images that failed with a transient error.

    Raises:
        NothingWrittenError: After all splits, if no instance of one became a sample.
        D2IError: If the user can fix the error; finished shards are kept.
    """
    summaries = make_splits(
        request, session, on_progress, network_policy=network_policy, retry_failed=retry_failed
    )
    refuse_empty(summaries)
    return summaries


def make_splits(
    request: PreprocessRequest,
    session: Session,
    on_progress: Callable[[JobProgress], None],
    *,
    network_policy: NetworkPolicy = PUBLIC_NETWORK,
    retry_failed: bool = False,
) -> list[SplitSummary]:
    """Run the job as `preprocess` does, but leave empty splits to `refuse_empty`."""
    with storage.exclusive_lock(request.out):
        return _work(request, session, on_progress, network_policy, retry_failed=retry_failed)


def _work(
    request: PreprocessRequest,
    session: Session,
    on_progress: Callable[[JobProgress], None],
    network_policy: NetworkPolicy,
    *,
    retry_failed: bool,
) -> list[SplitSummary]:
    if request.reuse and storage.resolve(request.reuse) == storage.resolve(request.out):
        raise ConfigError(
            f"--reuse {request.reuse} is the same directory as --out; expected data prepared "
            "earlier; choose another --out"
        )
    plans = plan_job(request)
    # All splits of a directory share their settings, even if prepared one by one.
    if any(committed_names(storage.join(request.out, split)) for split in SPLITS):
        check_prepared_with(request.recipe, request.out)
    store_recipe(request.recipe, request.out)
    tasks, num_instances = _missing_tasks(request, plans)
    if retry_failed and not tasks:
        _plan_again(request, plans)
        tasks, num_instances = _missing_tasks(request, plans)
    progress = JobProgress(num_instances)
    if tasks:
        check_present(request.recipe.encoders, is_here=session.is_on_this_machine)
        images = _images(request, session, network_policy)
        _make_shards(request, session, plans, tasks, images, progress, on_progress)
    for split_url in _split_urls(request, plans):
        # Needed even if a killed command had already made all shards.
        _retract_placeholders(request, session, split_url)
        # Workers of a killed driver live on for a moment and may write beside this job.
        remove_uncommitted(split_url)
    return [_finish(request, session, split, plan) for split, plan in plans.items()]


def _make_shards(
    request: PreprocessRequest,
    session: Session,
    plans: dict[str, Plan],
    tasks: list[ShardTask],
    images: ImageSource,
    progress: JobProgress,
    on_progress: Callable[[JobProgress], None],
) -> None:
    """Fetch, encode and publish the missing shards."""
    tally = session.shared(Tally())
    fault = session.job_fault
    reuse = _reuse(request, session, plans)
    producer = FetchWorkerBuilder(images, request.recipe, tally, fault, reuse)
    consumer = EncodeWorkerBuilder(request.recipe, tuple(_split_urls(request, plans)), fault, reuse)
    offer = session.capacity()
    meter = Throughput(offer.num_busy(len(tasks)))

    def show() -> None:
        progress.refresh(tally)
        on_progress(progress)

    is_warned = False
    for _, result in session.pipeline(producer, consumer, tasks, show):
        progress.take(result)
        found = result.reconstruction
        warning = found.warning(request.recipe.encoders.vae) if found else None
        if warning and not is_warned:
            logging.getLogger(__name__).warning("%s", warning)
            is_warned = True
        meter.add(result.num_written + sum(result.failures.values()))
        show()
        session.trigger_at("job.shard_done")
    if (rate := meter.rate()) and session.capacity().has_workers_of(offer):
        save_rate(rate_decided_by(request, offer.unit), rate)


def _reuse(request: PreprocessRequest, session: Session, plans: dict[str, Plan]) -> Reuse | None:
    """Return how images of earlier data are reused, as their encoders and the new ones decide."""
    if request.reuse is None:
        return None
    encoders = EncodeWorkerBuilder(request.recipe, ())
    ((_, expected),) = session.map(ImagePartWorker, [encoders])
    return plan_reuse(storage.resolve(request.reuse), list(plans), expected)


def _retract_placeholders(request: PreprocessRequest, session: Session, split_url: str) -> None:
    """Retract placeholders that show only across all shards of a split."""
    if storage.exists(storage.join(split_url, MANIFEST_NAME)):
        # A training run may already use the finished data set.
        return
    retractions = plan_retractions(split_url, request.recipe.fetch.num_same_pictures)
    if not retractions:
        return
    worker = partial(RetractionWorker, _read_fingerprint(split_url), session.job_fault)
    for _ in session.map(worker, retractions):
        pass


def _missing_tasks(
    request: PreprocessRequest, plans: dict[str, Plan]
) -> tuple[list[ShardTask], int]:
    num_same = request.recipe.fetch.num_same_pictures
    tasks: list[ShardTask] = []
    num_instances = 0
    for split, plan in plans.items():
        split_url = storage.join(request.out, split)
        remove_uncommitted(split_url)
        for directory in ("plan", "ledger"):
            storage.remove_temp_files(storage.join(split_url, directory))
        commits = {commit.index: commit for commit in read_commits(split_url)}
        if not commits:
            _forget_fingerprint(split_url)
            remove_ledgers(split_url)
        supplements = read_supplements(split_url)
        _refuse_lost_shards(split_url, plan, set(commits), supplements)
        tasks += [
            ShardTask(split_url, i, records_sha256=plan.sha256(i))
            for i in range(plan.num_shards)
            if i not in commits
        ]
        tasks += _supplement_tasks(split_url, supplements, set(commits), num_same)
        # A supplement subtracts as many old failures as it holds instances: its sum is zero.
        done = sum(c.num_samples + sum(c.failures.values()) for c in commits.values())
        again = sum(s.num_instances for s in supplements if s.index not in commits)
        num_instances += plan.num_instances - done + again
    return tasks, num_instances


def _supplement_tasks(
    split_url: str, supplements: list[Supplement], committed: set[int], num_same: int
) -> list[ShardTask]:
    missing = [supplement for supplement in supplements if supplement.index not in committed]
    placeholders = placeholders_of(split_url, num_same) if missing else frozenset[str]()
    return [
        ShardTask(split_url, s.index, s.failures, placeholders, records_sha256=s.sha256)
        for s in missing
    ]


def _refuse_lost_shards(
    split_url: str, plan: Plan, committed: set[int], supplements: list[Supplement]
) -> None:
    """Refuse to remake a shard after its failures may have been retried.

    Raises:
        ShardError: If a planned shard is missing although a supplement is committed.
    """
    is_supplemented = any(supplement.index in committed for supplement in supplements)
    lost = [index for index in range(plan.num_shards) if index not in committed]
    if is_supplemented and lost:
        raise ShardError(
            f"{split_url}: shard {lost[0]} is missing, and cannot be rebuilt, because "
            "--retry-failed may have retried part of it since; restore it from a copy, or choose "
            "another --out"
        )


def _plan_again(request: PreprocessRequest, plans: dict[str, Plan]) -> None:
    """Plan a retry of all transient failures, once nothing else is left to do."""
    num_samples = request.recipe.preprocess.num_samples_per_shard
    for split, plan in plans.items():
        split_url = storage.join(request.out, split)
        merge_ledgers(split_url, plan.num_shards, read_supplements(split_url))
        plan_retry_shards(split_url, plan.num_shards, num_samples)


def _forget_fingerprint(split_url: str) -> None:
    """Remove the fingerprint: no shard has it yet, and it may come from a mistyped command."""
    for name in EMPTY_NAMES:
        storage.remove(storage.join(split_url, name))
    checksums.remove(fingerprint_url(split_url))


def _images(
    request: PreprocessRequest, session: Session, network_policy: NetworkPolicy
) -> ImageSource:
    root = request.recipe.corpus.image_root or source_directory(storage.resolve(request.source))
    return shared_source(root, request.recipe.fetch, network_policy, session)


def _split_urls(request: PreprocessRequest, plans: dict[str, Plan]) -> list[str]:
    return [storage.resolve(storage.join(request.out, split)) for split in plans]


def _read_fingerprint(split_url: str) -> dict[str, Any]:
    """Read the fingerprint of the shards; restore it from the manifest if it is lost.

    Raises:
        ShardError: If the manifest is lost as well, or the fingerprint is damaged.
    """
    url = fingerprint_url(split_url)
    if not storage.exists(url):
        checksums.write_bytes(url, canonical_json(read_manifest(split_url).fingerprint))
    return read_json(url, next_step="d2i repair restores it from the manifest", error=ShardError)


def _finish(request: PreprocessRequest, session: Session, split: str, plan: Plan) -> SplitSummary:
    split_url = storage.join(request.out, split)
    merge_ledgers(split_url, plan.num_shards, read_supplements(split_url))
    commits = read_commits(split_url)
    if not any(commit.num_samples for commit in commits):
        return _take_back(split_url, split, plan)
    fingerprint = _read_fingerprint(split_url)
    manifest = write_manifest(split_url, fingerprint, fault=session.trigger_at)
    if manifest.num_samples + sum(manifest.failures.values()) != plan.num_instances:
        raise ConfigError(
            f"{split_url} holds {manifest.num_samples} samples and {manifest.failures} failures; "
            f"expected {plan.num_instances} in all, as planned; run 'd2i verify {split_url}'"
        )
    return split_summary(split_url, split, plan, manifest.num_samples, manifest.failures)


def _take_back(split_url: str, split: str, plan: Plan) -> SplitSummary:
    """Remove the shards of a split without a sample; its ledger keeps the reasons.

    After a kill at any point, the same command remakes or removes what is left.
    """
    failures, example = commonest_failure(split_url)
    summary = split_summary(split_url, split, plan, 0, failures)
    remove_manifest(split_url)
    remove_supplements(split_url)
    remove_other_shards(split_url, ())
    _forget_fingerprint(split_url)
    return replace(summary, num_shards=0, example=example)
