"""Results of preprocessing: counts of what was read, written and dropped, by split and reason."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from d2i.errors import DataError
from d2i.io import storage
from d2i.report.data_split import read_splits
from d2i.report.document import OmittedSection, Section, tables_section
from d2i.report.evaluation import Evaluation, read_json
from d2i.report.table import Cell, Row, Table, count_cells, reason_rows

_TITLE = "Data"
_NEVER_REPLACED = (
    "{written:,} samples written, {dropped:,} dropped. An unusable image is never replaced: it is "
    "counted by reason."
)


def preparation_section(evaluations: Sequence[Evaluation]) -> Section | OmittedSection:
    """Account for every planned instance of every data set that was evaluated on."""
    parents = {_parent(e): str(e.card["data"]) for e in evaluations if e.card.get("data")}
    if not parents:
        return OmittedSection(_TITLE, "no metric card records its data set")
    try:
        tables = [_data_set(url) for url in parents.values()]
    except DataError as error:
        return OmittedSection(_TITLE, str(error))
    return tables_section("data", _TITLE, tables, is_folded=True)


def _parent(evaluation: Evaluation) -> str:
    return str(evaluation.card["data"]).rstrip("/").rpartition("/")[0]


def _data_set(url: str) -> Table:
    manifests = read_splits(url)
    parent = url.rstrip("/").rpartition("/")[0]
    plans = [
        read_json(storage.join(parent, split, "plan", "plan.json")) or {} for split in manifests
    ]
    found = manifests.values()
    sizes = [manifest.size_bytes for manifest in found]
    sizes += [sum(sizes)] if len(sizes) > 1 else []
    excluded = [plan.get("num_excluded", 0) for plan in plans]
    rows = [
        Row("Instances planned", count_cells(plan.get("num_instances") for plan in plans)),
        Row("Distinct images", count_cells(plan.get("num_images") for plan in plans)),
        Row("Samples written", count_cells(manifest.num_samples for manifest in found)),
        *_reasons("Dropped", [manifest.failures for manifest in found]),
        *_reasons("Record issues", [plan.get("problems", {}) for plan in plans]),
        *([Row("Excluded by --exclude", count_cells(excluded))] if any(excluded) else []),
        Row("Size of the shards", tuple(Cell(size, "MiB") for size in sizes)),
    ]
    columns = (*manifests, *(["all"] if len(manifests) > 1 else []))
    note = _NEVER_REPLACED.format(
        written=sum(manifest.num_samples for manifest in found),
        dropped=sum(sum(manifest.failures.values()) for manifest in found),
    )
    return Table("", columns, tuple(rows), (note,))


def _reasons(heading: str, counts: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Make one row per reason; if there is none at all, one row of zeros."""
    rows = reason_rows(counts, lambda reason: (f"{heading}: {reason.replace('_', ' ')}", ""))
    return rows or [Row(heading, count_cells([0] * len(counts)))]
