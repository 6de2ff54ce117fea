"""Retry of transient failures: supplement shards beside the committed ones.

The shards of a finished data set are not rewritten. The instances with a transient failure are
planned into new shards, numbered after the planned ones; their outcomes replace their rows in the
ledger.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.compute as pc

from d2i.dialog import Instance
from d2i.errors import ShardError
from d2i.io import checksums, storage
from d2i.io.parse import damaged, parse_json_value
from d2i.preprocess.ledger import (
    LedgerRow,
    count_failures,
    ledger_tables,
    ledger_url,
    read_shard_ledger,
    remove_ledger,
    write_ledger,
)
from d2i.preprocess.plan.planner import read_plan, records_url
from d2i.preprocess.plan.record_files import read_records, records_table, write_records
from d2i.shards import committed_names

_NAME = "supplements.json"
_PUT_BACK = "restore the original list from a copy, or choose another --out"


@dataclass(frozen=True)
class Supplement:
    """One shard of instances that are retried.

    Args:
        index: Its number, after those of the planned shards.
        num_instances: Number of instances it holds.
        failures: Their earlier failures, counted by reason.
        sha256: Of its records; None for older supplements, which have none.
    """

    index: int
    num_instances: int
    failures: dict[str, int]
    sha256: str | None = None


def read_supplements(split_url: str) -> list[Supplement]:
    """Return the supplements planned so far, in order.

    Raises:
        ShardError: If the list is damaged.
    """
    url = _url(split_url)
    if not storage.exists(url):
        return []
    refused: dict[str, Any] = {"next_step": _PUT_BACK, "error": ShardError}
    listed = parse_json_value(checksums.read_bytes(url, **refused), url, **refused)
    try:
        return msgspec.convert(listed, list[Supplement])
    except msgspec.ValidationError as err:
        raise damaged(url, err, "a list of supplements", **refused) from err


def plan_retry_shards(split_url: str, num_shards: int, num_samples: int) -> list[Supplement]:
    """Plan the instances with transient failures into new shards.

    Args:
        split_url: A data set of which every planned shard is committed and merged.
        num_shards: Number of shards of the first plan.
        num_samples: Minimum number of instances of a new shard, but for the last one.

    Returns:
        All supplements, earlier ones included.

    Raises:
        ShardError: If a committed supplement is missing from the list of supplements.
    """
    planned = read_supplements(split_url)
    _refuse_unlisted(split_url, num_shards, planned)
    again = _transient_failures(split_url, num_shards)
    for index, part in enumerate(_parts(again, num_samples), start=num_shards + len(planned)):
        instances = sorted((instance for instance, _ in part), key=lambda i: i.key)
        sha256 = write_records(records_url(split_url, index), records_table(instances))
        failures = dict(sorted(Counter(reason for _, reason in part).items()))
        planned.append(Supplement(index, len(part), failures, sha256))
    # Written last: records that are not listed here belong to no shard, and are overwritten.
    data = json.dumps([asdict(supplement) for supplement in planned], indent=1).encode()
    checksums.write_bytes(_url(split_url), data)
    return planned


def remove_supplements(split_url: str) -> None:
    """Remove the list of planned retries."""
    checksums.remove(_url(split_url))


def merge_ledgers(split_url: str, num_shards: int, supplements: Iterable[Supplement]) -> None:
    """Replace ledger rows with those of committed supplements, in one pass.

    A repeat after a kill does the rest; afterwards each key has one row again.
    """
    there = [s for s in supplements if storage.exists(ledger_url(split_url, s.index))]
    # Later supplements override earlier ones.
    newer = {row.key: row for s in there for row in read_shard_ledger(split_url, s.index)}
    if there:
        keys = pa.array(newer, pa.string())
        for index, table in ledger_tables(split_url, ["key"], shards=range(num_shards)):
            if pc.any(pc.is_in(table["key"], value_set=keys)).as_py():
                rows = read_shard_ledger(split_url, index)
                write_ledger(split_url, index, [newer.get(row.key, row) for row in rows])
    for supplement in there:
        remove_ledger(split_url, supplement.index)


def net_failures(rows: Iterable[LedgerRow], before: dict[str, int]) -> dict[str, int]:
    """Return the change in failed instances since before, by reason; negative if fewer failed."""
    change = Counter(count_failures(rows))
    change.subtract(before)
    return {reason: count for reason, count in sorted(change.items()) if count}


def _transient_failures(split_url: str, num_shards: int) -> Iterator[tuple[Instance, str]]:
    """Yield the instances with transient failures, by shard and image, with the reason."""
    columns, plan = ["key", "status", "reason"], read_plan(split_url)
    for index, table in ledger_tables(split_url, columns, shards=range(num_shards)):
        passing = table.filter(pc.equal(table["status"], "passing"))
        reasons = dict(zip(passing["key"].to_pylist(), passing["reason"].to_pylist(), strict=True))
        if reasons:
            instances = read_records(records_url(split_url, index), plan.sha256(index))
            failed = (instance for instance in instances if instance.key in reasons)
            for instance in sorted(failed, key=lambda i: (i.image_ref.value, i.key)):
                yield instance, reasons[instance.key]


def _refuse_unlisted(split_url: str, num_shards: int, planned: list[Supplement]) -> None:
    numbers = {index for index in committed_names(split_url) if index >= num_shards}
    if unlisted := numbers - {supplement.index for supplement in planned}:
        raise ShardError(
            f"{_url(split_url)} does not list shard {min(unlisted)}, which an earlier "
            f"--retry-failed made; {_PUT_BACK}"
        )


def _parts(
    instances: Iterable[tuple[Instance, str]], num_samples: int
) -> Iterator[list[tuple[Instance, str]]]:
    """Cut into parts of at least `num_samples`; instances of one image stay together."""
    part: list[tuple[Instance, str]] = []
    for instance, reason in instances:
        if len(part) >= num_samples and part[-1][0].image_ref != instance.image_ref:
            yield part
            part = []
        part.append((instance, reason))
    if part:
        yield part


def _url(split_url: str) -> str:
    return storage.join(split_url, "plan", _NAME)
