"""Summaries of finished splits, hosts with the most failures, and the error for empty splits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

import pyarrow.compute as pc

from d2i.errors import NothingWrittenError
from d2i.preprocess.ledger import ledger_tables
from d2i.preprocess.plan.planner import Plan

_NUM_HOSTS = 5


@dataclass(frozen=True)
class HostFailures:
    """Failed instances of one host, counted by reason."""

    host: str
    failures: dict[str, int]

    @property
    def num(self) -> int:
        """Number of all failed instances."""
        return sum(self.failures.values())


def hosts_of_failure(split_url: str) -> list[HostFailures]:
    """Return the hosts with the most failed instances of a split, worst first."""
    by_host: dict[str, Counter[str]] = {}
    for _, table in ledger_tables(split_url, ["status", "final_url", "reason"]):
        failed = table.filter(pc.not_equal(table["status"], "ok"))
        urls, reasons = failed["final_url"].to_pylist(), failed["reason"].to_pylist()
        for url, reason in zip(urls, reasons, strict=True):
            if host := _host(url):
                by_host.setdefault(host, Counter())[reason] += 1
    hosts = [HostFailures(host, dict(sorted(c.items()))) for host, c in by_host.items()]
    return sorted(hosts, key=lambda h: (-h.num, h.host))[:_NUM_HOSTS]


def _host(url: str | None) -> str | None:
    try:
        return urlsplit(url or "").hostname
    except ValueError:
        return None


@dataclass(frozen=True)
class SplitSummary:
    """The outcome of one split: every planned instance is written or has a reason.

    If none was written, nothing is published, and `example` is the detail of one of the commonest
    failures.
    """

    split: str
    num_instances: int
    num_images: int
    num_written: int
    num_excluded: int
    num_unmatched: int
    failures: dict[str, int]
    problems: dict[str, int]
    num_shards: int
    hosts: list[HostFailures]
    example: str | None = None


def refuse_empty(summaries: Iterable[SplitSummary]) -> None:
    """Raise an error that names the splits without a sample, and the reasons.

    Raises:
        NothingWrittenError: If there is such a split.
    """
    empty = [
        f"{summary.split}: 0 of {summary.num_instances} instances became a sample; most common "
        f"reason: {max(summary.failures, key=summary.failures.__getitem__)} ({summary.example})"
        for summary in summaries
        if not summary.num_written
    ]
    if empty:
        raise NothingWrittenError(
            f"{'; '.join(empty)}; expected at least one; a split without samples is not published: "
            "fix the reason and repeat the command, which starts that split over"
        )


def split_summary(
    split_url: str, split: str, plan: Plan, num_written: int, failures: Mapping[str, int]
) -> SplitSummary:
    """Return the summary of a finished split, whose ledger is merged."""
    return SplitSummary(
        split=split,
        num_instances=plan.num_instances,
        num_images=plan.num_images,
        num_written=num_written,
        num_excluded=plan.num_excluded,
        num_unmatched=plan.num_unmatched,
        failures=dict(failures),
        problems=plan.problems,
        num_shards=plan.num_shards,
        hosts=hosts_of_failure(split_url),
    )
