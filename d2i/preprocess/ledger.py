"""The ledger: one row for every instance key, with the outcome of that instance.

Its columns are listed in docs/format.md, Prepared data.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc

from d2i.errors import ShardError
from d2i.io import checksums, storage
from d2i.io.parse import parse_parquet
from d2i.io.prefetch import prefetch_map
from d2i.preprocess.plan.record_files import table_bytes

Status = Literal["ok", "permanent", "passing"]

NON_FINITE_TEXT = "non_finite_text"
"""The only failure reason that does not concern the image."""

SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("image", pa.string()),
        ("status", pa.string()),
        ("reason", pa.string()),
        ("detail", pa.string()),
        ("attempts", pa.int32()),
        ("http_status", pa.int32()),
        ("final_url", pa.string()),
        ("size_bytes", pa.int64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("sha256", pa.string()),
        ("time_s", pa.float64()),
    ]
)


_NAME = re.compile(r"(\d+)\.parquet")
_REFUSED: dict[str, Any] = {
    "next_step": "restore it from a copy: the outcome of each instance is recorded nowhere else",
    "error": ShardError,
}


@dataclass(frozen=True)
class LedgerRow:
    """The outcome of one instance.

    Args:
        status: `ok`; `permanent` if a retry cannot help; `passing` (transient) if it may.
        reason: `ok`, or the class of the failure.
        time_s: Unix time of the last attempt.
    """

    key: str
    image: str
    status: Status
    reason: str
    detail: str
    attempts: int
    http_status: int | None
    final_url: str | None
    size_bytes: int | None
    width: int | None
    height: int | None
    sha256: str | None
    time_s: float


def ledger_url(split_url: str, index: int) -> str:
    """Return the URL of the ledger of one planned shard."""
    return storage.join(split_url, "ledger", f"{index:06d}.parquet")


def write_ledger(split_url: str, index: int, rows: list[LedgerRow]) -> None:
    """Write the rows of one planned shard atomically, in key order."""
    ordered = [asdict(row) for row in sorted(rows, key=lambda row: row.key)]
    data = bytes(table_bytes(pa.Table.from_pylist(ordered, SCHEMA)))
    checksums.write_bytes(ledger_url(split_url, index), data)


def read_ledger(split_url: str) -> list[LedgerRow]:
    """Read every row of a split, shard by shard."""
    return list(iter_ledger(split_url))


def iter_ledger(split_url: str) -> Iterator[LedgerRow]:
    """Read the rows of a split one shard at a time."""
    for _, table in ledger_tables(split_url):
        yield from _rows(table)


def ledger_tables(
    split_url: str,
    columns: Sequence[str] = SCHEMA.names,
    *,
    shards: Container[int] | None = None,
) -> Iterator[tuple[int, pa.Table]]:
    """Yield each shard's number and its ledger, reduced to some columns of `SCHEMA`.

    Args:
        split_url: The data set's directory.
        columns: The columns to read.
        shards: Numbers of the shards to read, if they have a ledger; None reads all that have one.
    """
    directory = storage.join(split_url, "ledger")
    found = [
        int(match[1]) for match in map(_NAME.fullmatch, storage.list_names(directory)) if match
    ]
    wanted = [number for number in found if shards is None or number in shards]
    schema = pa.schema([SCHEMA.field(column) for column in columns])
    for number, data in zip(wanted, prefetch_map(_reader(split_url), wanted, 32), strict=True):
        yield number, _parse(data, ledger_url(split_url, number), schema)


def read_shard_ledger(split_url: str, index: int) -> list[LedgerRow]:
    """Read the rows of one planned shard, in key order.

    Raises:
        FileNotFoundError: If the shard has no ledger.
        ShardError: If the ledger is damaged.
    """
    data = _reader(split_url)(index)
    return _rows(_parse(data, ledger_url(split_url, index), SCHEMA))


def remove_ledger(split_url: str, index: int) -> None:
    """Remove the ledger of one planned shard."""
    checksums.remove(ledger_url(split_url, index))


def _reader(split_url: str) -> Callable[[int], bytes]:
    """Return a function that reads a shard's ledger and checks it against the sha256 beside it."""
    return lambda index: checksums.read_bytes(ledger_url(split_url, index), **_REFUSED)


def _parse(data: bytes, url: str, schema: pa.Schema) -> pa.Table:
    return parse_parquet(data, url, schema, **_REFUSED)


def _rows(table: pa.Table) -> list[LedgerRow]:
    return [LedgerRow(**row) for row in table.to_pylist()]


def commonest_failure(split_url: str) -> tuple[dict[str, int], str]:
    """Return the failures of a split by reason, and the first detail of the commonest reason.

    Raises:
        ShardError: If the ledger is missing.
    """
    counts: Counter[str] = Counter()
    details: dict[str, str] = {}
    for _, table in ledger_tables(split_url, ["status", "reason", "detail"]):
        failed = table.filter(pc.not_equal(table["status"], "ok"))
        for reason, detail in zip(
            failed["reason"].to_pylist(), failed["detail"].to_pylist(), strict=True
        ):
            counts[reason] += 1
            details.setdefault(reason, detail)
    if not counts:
        raise ShardError(
            f"{split_url}: no instance became a sample, and the ledger, which has the reasons, is "
            "missing; choose another --out"
        )
    # Ties go to the first reason by name.
    commonest = min(counts, key=lambda reason: (-counts[reason], reason))
    return dict(sorted(counts.items())), details[commonest]


def remove_ledgers(split_url: str) -> None:
    """Remove all rows of a split that has no committed shard yet."""
    directory = storage.join(split_url, "ledger")
    for name in storage.list_names(directory):
        storage.remove(storage.join(directory, name))


def count_failures(rows: Iterable[LedgerRow]) -> dict[str, int]:
    """Return the number of failed instances by reason, sorted by reason."""
    return dict(sorted(Counter(row.reason for row in rows if row.status != "ok").items()))
