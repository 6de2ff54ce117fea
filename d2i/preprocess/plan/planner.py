"""The plan of a split: its instances, and the shard of each one.

The plan is a function of the corpus, the recipe, `--limit`, `--seed` and `--exclude` alone. It is
written beside the shards before anything is fetched, so that a repeated command does the same
work. Memory use hardly grows with the corpus: rows go through files on disk (`shard_assignment`),
and only eight bytes per dialog stay in memory.
"""

from __future__ import annotations

import itertools
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import msgspec
import numpy as np
import pyarrow as pa

from d2i.config import LEGACY_DEFAULTS, Recipe
from d2i.corpora import RecordIssue, build_corpus, read_instances
from d2i.corpora.records import IssueCounter
from d2i.corpora.splits import corpus_name, source_directory
from d2i.dialog import Instance
from d2i.errors import ConfigError, DataError
from d2i.io import checksums, storage
from d2i.io.config_lock import diff, with_legacy_defaults
from d2i.io.parse import damaged, read_json
from d2i.io.prefetch import prefetch_map
from d2i.preprocess.plan.exclude import NOTHING, Exclusion
from d2i.preprocess.plan.inline_images import INLINE_DIRECTORY, InlineWriter
from d2i.preprocess.plan.record_files import PLAN_AGAIN, write_records
from d2i.preprocess.plan.selection import SmallestRankSampler
from d2i.preprocess.plan.shard_assignment import ShardAssigner
from d2i.shards import committed_names

_FORMAT = 2
_SECTIONS = ("corpus", "image", "text", "encoders")
"""Groups of settings that determine a plan; of `preprocess`, some do."""
_FORMERLY = {
    f"recipe.{path}": value
    for path, value in LEGACY_DEFAULTS.items()
    if path.partition(".")[0] in _SECTIONS
}
_BATCH, _BATCH_CHARS = 500, 16 << 20
"""Instances and characters per batch. It is small enough to stay in the CPU cache while it is laid
out in columns, and to take little memory where contexts are long."""
_NUM_WRITERS = 4
_NUM_DISTANT_WRITERS = 32
"""For object stores, where a write mostly waits for the network."""


@dataclass(frozen=True)
class PlanRequest:
    """The inputs that determine a plan."""

    corpus: str
    source: str
    split: str
    recipe: Recipe
    limit: int | None = None
    seed: int = 0
    exclusion: Exclusion = NOTHING


@dataclass(frozen=True)
class Plan:
    """The plan of one split, as kept in `plan/plan.json`.

    `most_occurrences` is the number of instances of the most frequent image; one shard holds all
    of them. `corpus_name` is the corpus's own name, if it only shares the layout of the corpus
    that was requested. `num_unmatched` counts the keys of this split in the `--exclude` list that
    match no instance read. `files` maps the file names of the records to their sha256; older plans
    have none.
    """

    decided_by: dict[str, Any]
    num_instances: int
    num_images: int
    num_shards: int
    num_excluded: int
    problems: dict[str, int]
    most_occurrences: int = 0
    num_unmatched: int = 0
    corpus_name: str | None = None
    format: int = _FORMAT
    files: dict[str, str] = field(default_factory=dict)

    def sha256(self, index: int) -> str | None:
        """Return the sha256 of a shard's records; None if the plan does not record it."""
        return self.files.get(_records_name(index))


def make_plan(request: PlanRequest, split_url: str, *, keep: bool = True) -> Plan:
    """Return the plan at `split_url`, and make it if it does not exist yet.

    A plan with other settings is replaced as long as no shard of it is committed.

    Args:
        request: The inputs of the plan.
        split_url: The data set's directory.
        keep: Whether to write a new plan there, with the records of its shards.

    Raises:
        ConfigError: If the limit is below 1, or if shards with other settings are committed; the
            error names the difference.
        DataError: If the corpus holds no instance of this split.
    """
    if request.limit is not None and request.limit < 1:
        raise ConfigError(
            f"limit: got {request.limit}, expected 1 or more; leave it out to plan every instance"
        )
    there = read_plan(split_url) if storage.exists(plan_url(split_url)) else None
    if there is not None:
        named = diff(all_settings(_decided_by(request)), all_settings(there.decided_by))
        if not named:
            return there
        if committed_names(split_url):
            raise ConfigError(
                f"{split_url} was begun with other settings: got {'; '.join(named[:3])}; "
                "use the same settings, or choose another --out"
            )
    with tempfile.TemporaryDirectory(prefix="d2i-plan-") as scratch:
        return _Planner(request, split_url if keep else None, Path(scratch)).plan()


class _Planner:
    """One pass over the corpus, from its records to the records of the shards."""

    def __init__(self, request: PlanRequest, split_url: str | None, scratch: Path) -> None:
        self.request = request
        self.split_url = split_url
        self.scratch = scratch
        self.problems = IssueCounter()
        self.num_excluded = 0
        self.files: dict[str, str] = {}
        self.inline = InlineWriter(scratch / "inline", split_url)

    def plan(self) -> Plan:
        """Read, select and group the instances; write the plan if it is kept."""
        with (
            ShardAssigner(self.scratch) as grouped,
            (self.scratch / "problems.jsonl").open("wb") as problems,
        ):
            max_rank = self._choose(self._read(problems), grouped)
        counts = Counter[str]()
        shards = grouped.shards(max_rank, self.request.recipe.preprocess.num_samples_per_shard)
        if self.split_url is not None:
            _clear_plan(self.split_url)
            shards = self._written(shards, self.split_url)
        for shard in shards:
            counts["shards"] += 1
            counts["instances"] += shard.num_rows
        if not counts["instances"]:
            raise DataError(self._why_none())
        plan = Plan(
            decided_by=_decided_by(self.request),
            num_instances=counts["instances"],
            num_images=grouped.num_images,
            num_shards=counts["shards"],
            num_excluded=self.num_excluded,
            problems=self.problems.counts,
            most_occurrences=grouped.most_occurrences,
            num_unmatched=self.request.exclusion.num_of(self.request.split) - self.num_excluded,
            corpus_name=corpus_name(source_directory(storage.resolve(self.request.source))),
            files=self.files,
        )
        if self.split_url is not None:
            self._finish(plan, self.split_url)
        return plan

    def _why_none(self) -> str:
        """Return the reason for an empty plan, with the first case of each record issue."""
        split, num_excluded = self.request.split, self.num_excluded
        if num_excluded:
            return (
                f"{split}: --exclude leaves out all {num_excluded} instances; expected some to "
                "remain; use another list"
            )
        why = self.problems.describe() or "no dialog shows an image"
        return (
            f"{split}: got no instance: {why}; expected dialogs with an image and text; fix the "
            "records, or check --corpus and --source; 'd2i corpus' shows what the source holds"
        )

    def _finish(self, plan: Plan, split_url: str) -> None:
        """Write `plan.json`, once all other files of the plan are durable."""
        self.inline.finish()
        problems_url = storage.join(split_url, "plan", "problems.jsonl")
        # Also syncs the directory entries of the records.
        storage.publish_atomically(self.scratch / "problems.jsonl", problems_url)
        data = json.dumps(asdict(plan), indent=1, sort_keys=True).encode()
        checksums.write_bytes(plan_url(split_url), data)

    def _written(self, shards: Iterable[pa.Table], split_url: str) -> Iterator[pa.Table]:
        """Write the records of several shards at a time, and yield each shard once written.

        Their directory entries are synced at the end, as none counts before `plan.json` exists.
        """

        def write(numbered: tuple[int, pa.Table]) -> tuple[int, pa.Table, str]:
            index, shard = numbered
            sha256 = write_records(records_url(split_url, index), shard, sync_name=False)
            return index, shard, sha256

        is_here = storage.local_path(split_url) is not None
        num_writers = _NUM_WRITERS if is_here else _NUM_DISTANT_WRITERS
        for index, shard, sha256 in prefetch_map(write, enumerate(shards), num_writers):
            self.files[_records_name(index)] = sha256
            yield shard

    def _read(self, problems: IO[bytes]) -> Iterator[Instance]:
        """Read the instances that are not excluded, and write every record issue to a file."""

        def note(problem: RecordIssue) -> None:
            self.problems.add(problem)
            problems.write(msgspec.json.encode(problem) + b"\n")

        request = self.request
        config = request.recipe.corpus
        instances = read_instances(
            request.corpus,
            request.source,
            request.split,
            on_problem=note,
            max_broken=config.max_broken,
            inline=self.inline.images(request.recipe.fetch.max_image_bytes),
            **config.options(),
        )
        if not request.exclusion.keys:
            return instances
        return self._without_excluded(instances)

    def _without_excluded(self, instances: Iterator[Instance]) -> Iterator[Instance]:
        for instance in instances:
            if instance.key in self.request.exclusion.keys:
                self.num_excluded += 1
            else:
                yield instance

    def _choose(self, instances: Iterator[Instance], grouped: ShardAssigner) -> int:
        """Group the candidate instances; return the largest rank that is selected."""
        request = self.request
        rule = request.recipe.preprocess.choose
        choice = SmallestRankSampler(request.limit, rule, request.seed)
        if rule == "first":
            instances = itertools.islice(instances, request.limit)
        for batch in _batches(instances, self.inline.is_full):
            ranks = choice.rank(batch)
            wanted = np.flatnonzero(ranks <= np.uint64(choice.max_rank))
            if len(wanted) < len(batch):
                batch, ranks = [batch[i] for i in wanted], ranks[wanted]
            self.inline.publish(batch)
            grouped.add(batch, ranks)
        return choice.last_rank()


def _batches(
    instances: Iterator[Instance], is_full: Callable[[], bool]
) -> Iterator[list[Instance]]:
    """Yield `_BATCH` instances at a time, or fewer at `_BATCH_CHARS` or when `is_full()`."""
    batch: list[Instance] = []
    num_chars = 0
    for instance in instances:
        batch.append(instance)
        num_chars += sum([len(turn.text) for turn in instance.context])
        if len(batch) >= _BATCH or num_chars >= _BATCH_CHARS or is_full():
            yield batch
            batch, num_chars = [], 0
    if batch:
        yield batch


def read_plan(split_url: str) -> Plan:
    """Read the plan of a split.

    Raises:
        FileNotFoundError: If there is no plan.
        ConfigError: If it is damaged.
    """
    refused: dict[str, Any] = {"next_step": PLAN_AGAIN, "error": ConfigError}
    values = read_json(plan_url(split_url), **refused)
    try:
        return msgspec.convert(values, Plan)
    except msgspec.ValidationError as err:
        raise damaged(plan_url(split_url), err, "a plan", **refused) from err


def all_settings(decided_by: Mapping[str, Any]) -> dict[str, Any]:
    """Return what determined a plan, completed with the settings that the plan does not record."""
    return with_legacy_defaults(decided_by, _FORMERLY)


def _clear_plan(split_url: str) -> None:
    """Remove a plan that is being replaced: `plan.json` first, as the rest counts only with it."""
    checksums.remove(plan_url(split_url))
    directory = storage.join(split_url, "plan")
    for name in storage.list_names(directory):
        if name != INLINE_DIRECTORY:
            # It already holds the images of the new plan.
            storage.remove(storage.join(directory, name))


def plan_url(split_url: str) -> str:
    """Return the URL of `plan.json`."""
    return storage.join(split_url, "plan", "plan.json")


def fingerprint_url(split_url: str) -> str:
    """Return the URL of the fingerprint, which is written before the manifest."""
    return storage.join(split_url, "plan", "fingerprint.json")


def records_url(split_url: str, index: int) -> str:
    """Return the URL of the records of one planned shard."""
    return storage.join(split_url, "plan", _records_name(index))


def _records_name(index: int) -> str:
    return f"{index:06d}.parquet"


def _decided_by(request: PlanRequest) -> dict[str, Any]:
    recipe = request.recipe.model_dump(mode="json")
    settings = {name: recipe[name] for name in _SECTIONS}
    # max_broken changes no instance, and older plans have neither split_* nor max_upscale.
    settings["corpus"] = {
        name: value
        for name, value in recipe["corpus"].items()
        if name != "max_broken" and (value is not None or not name.startswith("split_"))
    }
    settings["image"] = {
        name: value
        for name, value in recipe["image"].items()
        if name != "max_upscale" or value is not None
    }
    # Chats are only encoded while training.
    settings["text"] = {
        name: value for name, value in recipe["text"].items() if name not in ("format", "roles")
    }
    settings["preprocess"] = {
        name: recipe["preprocess"][name]
        for name in ("choose", "num_samples_per_shard", "keep_images")
    }
    root = storage.resolve(request.source)
    corpus = build_corpus(request.corpus, request.recipe.corpus.options())
    directory = source_directory(root)
    files = [storage.join(directory, path) for path in corpus.files(root, request.split)]
    if corpus.descriptions and storage.exists(corpus.descriptions):
        files.append(corpus.descriptions)
    return {
        "corpus": request.corpus,
        "source": root,
        "size_bytes": {url: storage.size_bytes(url) for url in files},
        "split": request.split,
        "limit": request.limit,
        "seed": request.seed,
        "exclude": request.exclusion.sha256,
        "recipe": settings,
    }
