"""Files of the job beside prepared shards: the recipe, plan, records and ledger that made them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

from d2i.config import Recipe, load_config
from d2i.errors import ConfigError, D2IError, DataError, ShardError
from d2i.io import storage
from d2i.io.parse import damaged, read_json
from d2i.preprocess.ledger import LedgerRow, ledger_url, read_shard_ledger
from d2i.preprocess.plan.planner import (
    Plan,
    all_settings,
    fingerprint_url,
    plan_url,
    read_plan,
    records_url,
)
from d2i.preprocess.plan.record_files import read_records
from d2i.preprocess.plan.supplements import net_failures, read_supplements
from d2i.recipes import read_stored_recipe, refuse_host
from d2i.shards import ShardProblem, read_manifest

_REPAIR = "d2i repair restores it from the manifest"
_WRITTEN_AGAIN = (
    "missing; it is needed only to remake shards; repeat the d2i preprocess command that made them "
    "to write it again"
)
_FOR_GOOD = (
    "missing, and cannot be restored; the manifest still counts the failures, but does not name "
    "the failed instances, so --retry-failed cannot retry them"
)


class JobFiles:
    """The files of the job that made one data set.

    Args:
        split_url: The data set's directory.

    Raises:
        ConfigError: If its plan is missing or damaged.
    """

    def __init__(self, split_url: str) -> None:
        self.split_url = split_url
        try:
            self.plan: Plan = read_plan(split_url)
        except FileNotFoundError as err:
            raise ConfigError(
                f"{plan_url(split_url)} does not exist; expected a directory written by d2i "
                "preprocess; check the path"
            ) from err
        self.supplements = {s.index: s for s in read_supplements(split_url)}

    def recipe(self) -> Recipe:
        """Return the recipe; settings that determined the plan are taken from the plan.

        Raises:
            ConfigError: If it is missing or damaged.
        """
        try:
            values = read_stored_recipe(self.split_url).model_dump(mode="json")
        except ValueError as err:
            if isinstance(err, ConfigError):
                raise
            raise ConfigError(f"the recipe.json of {self.split_url} is damaged: {err}") from err
        for section, fields in all_settings(self.plan.decided_by)["recipe"].items():
            values[section] |= fields
        return load_config(Recipe, values, source=f"the plan of {self.split_url}")

    def source(self) -> str:
        """Return the source of the corpus, to whose directory image paths are relative.

        Raises:
            ConfigError: If it is a URL of a host, which only the command itself may name.
        """
        source = str(self.plan.decided_by["source"])
        refuse_host(f"the source of {self.split_url}", source, "--set corpus.image_root=URL")
        return source

    def fingerprint(self) -> dict[str, Any] | None:
        """Return the fingerprint of the shards, or None if it is lost."""
        try:
            return read_json(fingerprint_url(self.split_url))
        except (OSError, DataError):
            return None

    def indexes(self) -> list[int]:
        """Return the numbers of all planned shards, supplements last."""
        return [*range(self.plan.num_shards), *sorted(self.supplements)]

    def written_keys(self, index: int) -> frozenset[str] | None:
        """Return the keys of a shard's samples from the ledger; None if it is lost."""
        rows = self._rows(index)
        if rows is None:
            return None
        later = self._later_keys(index)
        return frozenset(r.key for r in rows if r.status == "ok" and r.key not in later)

    def failures(self, index: int) -> dict[str, int] | None:
        """Return the failures in a shard's commit record; None if the ledger has lost them.

        A row that a later supplement replaced no longer holds the outcome of the first request.
        """
        rows = self._rows(index)
        if rows is None or not self._later_keys(index).isdisjoint(row.key for row in rows):
            return None
        supplement = self.supplements.get(index)
        return net_failures(rows, supplement.failures if supplement else {})

    def check_records(self, index: int) -> None:
        """Read the records of a shard.

        Raises:
            FileNotFoundError: If they are missing.
            ShardError: If they are not those that were planned.
        """
        read_records(records_url(self.split_url, index), self.records_sha256(index))

    def _rows(self, index: int) -> list[LedgerRow] | None:
        try:
            if storage.exists(ledger_url(self.split_url, index)):
                return read_shard_ledger(self.split_url, index)
            # A merged supplement's rows are in the ledgers of the planned shards.
            keys = self._planned_keys(index)
            shards = range(self.plan.num_shards)
            rows = (row for shard in shards for row in read_shard_ledger(self.split_url, shard))
            return [row for row in rows if row.key in keys]
        except (OSError, ShardError):
            return None

    def records_sha256(self, index: int) -> str | None:
        """Return the sha256 of a shard's records; None if plan or supplements lack it."""
        supplement = self.supplements.get(index)
        return supplement.sha256 if supplement else self.plan.sha256(index)

    def _later_keys(self, index: int) -> set[str]:
        """Return the keys that were retried after a shard was made."""
        later = (number for number in self.supplements if number > index)
        return {key for number in later for key in self._planned_keys(number)}

    def _planned_keys(self, index: int) -> set[str]:
        url = records_url(self.split_url, index)
        return {i.key for i in read_records(url, self.records_sha256(index))}


def lost_files(split_url: str, indexes: Iterable[int]) -> Iterator[str]:
    """Yield a line for each kind of job file that is lost, and what the loss means.

    Shards that other programs made, without plan and ledger, have no job files to lose.

    Args:
        split_url: The data set's directory.
        indexes: The numbers of its shards.
    """
    if not any(storage.exists(storage.join(split_url, name)) for name in ("plan", "ledger")):
        return
    if not _has_recipe(split_url):
        yield f"recipe.json: {_WRITTEN_AGAIN}"
    names = [f"{index:06d}.parquet" for index in indexes]
    for directory, expected, meaning in (
        ("plan", ["plan.json", *names], _WRITTEN_AGAIN),
        ("ledger", names, _FOR_GOOD),
    ):
        there = set(storage.list_names(storage.join(split_url, directory)))
        if lost := [name for name in expected if name not in there]:
            more = f" and {len(lost) - 1} more" if lost[1:] else ""
            yield f"{directory}/{lost[0]}{more}: {meaning}"


def _has_recipe(split_url: str) -> bool:
    parent = storage.resolve(split_url).rpartition("/")[0]
    return any(storage.exists(storage.join(url, "recipe.json")) for url in (split_url, parent))


def check_job_files(split_url: str) -> Iterator[ShardProblem]:
    """Read plan and ledger of a data set, and compare them with their checksums.

    Without a plan, another program made the data, and nothing is checked. Missing files are
    reported by `lost_files`.
    """
    if not storage.exists(plan_url(split_url)):
        return
    try:
        job = JobFiles(split_url)
    except (D2IError, OSError) as err:
        yield ShardProblem("plan/plan.json", "plan", str(err))
        return
    if _has_recipe(split_url):
        yield from _problem("recipe.json", "plan", job.recipe)
    yield from _problem("plan/fingerprint.json", "plan", lambda: _check_fingerprint(job))
    for index in job.indexes():
        name = f"{index:06d}.parquet"
        yield from _problem(f"plan/{name}", "plan", partial(job.check_records, index))
        ledger = partial(read_shard_ledger, split_url, index)
        yield from _problem(f"ledger/{name}", "ledger", ledger)


def _check_fingerprint(job: JobFiles) -> None:
    url = fingerprint_url(job.split_url)
    manifest = read_manifest(job.split_url)
    if read_json(url, next_step=_REPAIR, error=ShardError) != manifest.fingerprint:
        raise damaged(
            url, "it differs from the one in the manifest", next_step=_REPAIR, error=ShardError
        )


def _problem(file: str, reason: str, check: Callable[[], object]) -> Iterator[ShardProblem]:
    try:
        check()
    except FileNotFoundError:
        return
    except (D2IError, OSError) as err:
        yield ShardProblem(file, reason, str(err))
