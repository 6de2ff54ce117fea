"""What lies beside prepared shards says how they were made: recipe, plan, records and ledger."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa

from d2i import storage
from d2i.config import Recipe, load_config
from d2i.errors import ConfigError, ShardError
from d2i.preprocess.encode_worker import fingerprint_url
from d2i.preprocess.ledger import LedgerRow, ledger_url, read_shard_ledger
from d2i.preprocess.plan import Plan, records_url
from d2i.preprocess.records import read_records
from d2i.preprocess.retry import Supplement, net_failures, read_supplements
from d2i.recipes import read_kept_recipe

_WRITTEN_AGAIN = (
    "lost; the shards need it only to be made again, and the d2i preprocess command that made them "
    "writes it anew"
)
_FOR_GOOD = (
    "lost for good; the manifest still counts the failures, but nothing says which instances they "
    "were: --retry-failed cannot ask for them"
)


class KeptJob:
    """The job that made one data set.

    Args:
        split_url: The data set's folder.

    Raises:
        ConfigError: If its plan is not there or damaged.
    """

    def __init__(self, split_url: str) -> None:
        self.split_url = split_url
        self.plan = Plan(**_read_json(storage.join(split_url, "plan", "plan.json")))
        self.supplements = {s.index: s for s in _supplements(split_url)}

    def recipe(self) -> Recipe:
        """Return the recipe, with what decided the plan as the plan itself has it.

        Raises:
            ConfigError: If it is not there or damaged.
        """
        try:
            values = read_kept_recipe(self.split_url).model_dump(mode="json")
        except ValueError as err:
            if isinstance(err, ConfigError):
                raise
            raise ConfigError(f"the recipe.json of {self.split_url} is damaged: {err}") from err
        for section, fields in self.plan.decided_by["recipe"].items():
            values[section] |= fields
        return load_config(Recipe, values, source=f"the plan of {self.split_url}")

    def source(self) -> str:
        """Return the folder of the corpus, where its pictures lie.

        Raises:
            ConfigError: If that is an address, which counts only in the command.
        """
        source = str(self.plan.decided_by["source"])
        if storage.names_host(source):
            raise ConfigError(
                f"{self.split_url} was planned from {source!r}, an address in a file of this "
                "folder; expected it in the command, as it would be asked; if you trust that host, "
                "give --set corpus.image_root=ADDRESS"
            )
        return source

    def fingerprint(self) -> dict[str, Any] | None:
        """Return what the shards were made under, or None where that is lost."""
        try:
            return _read_json(fingerprint_url(self.split_url))
        except ConfigError:
            return None

    def indexes(self) -> list[int]:
        """Return the numbers of all shards that were planned, supplements last."""
        return [*range(self.plan.num_shards), *sorted(self.supplements)]

    def written_keys(self, index: int) -> frozenset[str] | None:
        """Return the keys of a shard's samples as the ledger has them; None where that is lost."""
        rows = self._rows(index)
        if rows is None:
            return None
        later = self._later_keys(index)
        return frozenset(r.key for r in rows if r.status == "ok" and r.key not in later)

    def failures(self, index: int) -> dict[str, int] | None:
        """Return the failures of a shard's record; None where the ledger tells them no more.

        A row that a later supplement replaced does not tell how asking ended the first time.
        """
        rows = self._rows(index)
        if rows is None or not self._later_keys(index).isdisjoint(row.key for row in rows):
            return None
        supplement = self.supplements.get(index)
        return net_failures(rows, supplement.failures if supplement else {})

    def _rows(self, index: int) -> list[LedgerRow] | None:
        try:
            if storage.exists(ledger_url(self.split_url, index)):
                return read_shard_ledger(self.split_url, index)
            # A supplement's rows are in the place of those that they replaced.
            keys = self._planned_keys(index)
            shards = range(self.plan.num_shards)
            rows = (row for shard in shards for row in read_shard_ledger(self.split_url, shard))
            return [row for row in rows if row.key in keys]
        except (OSError, pa.ArrowException):
            return None

    def _later_keys(self, index: int) -> set[str]:
        """Return the keys that were asked for again after a shard was made."""
        later = (number for number in self.supplements if number > index)
        return {key for number in later for key in self._planned_keys(number)}

    def _planned_keys(self, index: int) -> set[str]:
        return {i.key for i in read_records(records_url(self.split_url, index))}


def lost_files(split_url: str, indexes: Iterable[int]) -> Iterator[str]:
    """Say what of a job's own files is lost, beside the shards, and what that means.

    Of shards that other programs made, without plan and ledger, nothing is lost.

    Args:
        split_url: The data set's folder.
        indexes: The numbers of its shards.
    """
    if not any(storage.exists(storage.join(split_url, name)) for name in ("plan", "ledger")):
        return
    parent = storage.resolve(split_url).rpartition("/")[0]
    if not any(storage.exists(storage.join(url, "recipe.json")) for url in (split_url, parent)):
        yield f"recipe.json: {_WRITTEN_AGAIN}"
    names = [f"{index:06d}.parquet" for index in indexes]
    for folder, expected, meaning in (
        ("plan", ["plan.json", *names], _WRITTEN_AGAIN),
        ("ledger", names, _FOR_GOOD),
    ):
        there = set(storage.list_names(storage.join(split_url, folder)))
        if lost := [name for name in expected if name not in there]:
            more = f" and {len(lost) - 1} more" if lost[1:] else ""
            yield f"{folder}/{lost[0]}{more}: {meaning}"


def _supplements(split_url: str) -> list[Supplement]:
    try:
        return read_supplements(split_url)
    except (TypeError, ValueError) as err:
        raise ShardError(f"the supplements.json of {split_url} is damaged: {err}") from err


def _read_json(url: str) -> dict[str, Any]:
    try:
        value: dict[str, Any] = json.loads(storage.read_bytes(url))
    except FileNotFoundError as err:
        raise ConfigError(
            f"{url} is not there; expected a folder made by d2i preprocess; check the path"
        ) from err
    except ValueError as err:
        raise ConfigError(f"{url} is damaged: {err}; expected JSON as d2i writes it") from err
    return value
