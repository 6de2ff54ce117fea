"""Results of preprocessing: counts of what was read, written and dropped, by split and reason."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from d2i.errors import DataError
from d2i.io import storage
from d2i.report.data_split import read_splits
from d2i.report.evaluation import Evaluation, read_json
from d2i.report.html import OmittedSection, Section, count_cells, figure, reason_rows, table, text
from d2i.shards import Manifest

_TITLE = "Data"


def preparation_section(evaluations: Sequence[Evaluation]) -> Section | OmittedSection:
    """Account for every planned instance of every data set that was evaluated on."""
    parents = {_parent(e): str(e.card["data"]) for e in evaluations if e.card.get("data")}
    if not parents:
        return OmittedSection(_TITLE, "no metric card records its data set")
    try:
        parts = [_data_set(url) for url in parents.values()]
    except DataError as error:
        return OmittedSection(_TITLE, str(error))
    return Section("data", _TITLE, "".join(parts))


def _parent(evaluation: Evaluation) -> str:
    return str(evaluation.card["data"]).rstrip("/").rpartition("/")[0]


def _data_set(url: str) -> str:
    manifests = read_splits(url)
    parent = url.rstrip("/").rpartition("/")[0]
    plans = {
        split: read_json(storage.join(parent, split, "plan", "plan.json")) or {}
        for split in manifests
    }
    written = sum(manifest.num_samples for manifest in manifests.values())
    failed = sum(sum(manifest.failures.values()) for manifest in manifests.values())
    intro = (
        f'<p class="intro">{figure(written, ",")} samples written, {figure(failed, ",")} dropped. '
        "An unusable image is never replaced: it is counted by reason.</p>"
    )
    return intro + _table(manifests, plans)


def _table(manifests: Mapping[str, Manifest], plans: Mapping[str, Mapping[str, Any]]) -> str:
    failures = {split: manifest.failures for split, manifest in manifests.items()}
    size_bytes = sum(manifest.size_bytes for manifest in manifests.values())
    total = [_mebibytes(size_bytes)] if len(manifests) > 1 else []
    problems = {split: plan.get("problems", {}) for split, plan in plans.items()}
    excluded = [plan.get("num_excluded", 0) for plan in plans.values()]
    rows = [
        ("Instances planned", count_cells(plan.get("num_instances") for plan in plans.values())),
        ("Distinct images", count_cells(plan.get("num_images") for plan in plans.values())),
        ("Samples written", count_cells(m.num_samples for m in manifests.values())),
        *_reasons("Dropped", failures),
        *_reasons("Record issues", problems),
        *([("Excluded by --exclude", count_cells(excluded))] if any(excluded) else []),
        ("Size of the shards", [_mebibytes(m.size_bytes) for m in manifests.values()] + total),
    ]
    head = ["", *(text(split) for split in manifests), *(["all"] if total else [])]
    return table(head, rows)


def _reasons(heading: str, counts: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """Make one row per reason; if there is none at all, one row of zeros."""
    rows = reason_rows(
        counts.values(),
        lambda reason: f'{heading}: <span class="reason">{text(reason.replace("_", " "))}</span>',
    )
    return rows or [(heading, count_cells([0] * len(counts)))]


def _mebibytes(size_bytes: int) -> str:
    shown = f"{size_bytes / 2**20:,.1f} MiB"
    return f'<data value="{size_bytes}" title="{size_bytes} bytes">{shown}</data>'
