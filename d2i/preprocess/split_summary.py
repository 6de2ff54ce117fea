"""Summaries of finished splits, and the error for splits without a sample."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from d2i.errors import NothingWrittenError
from d2i.preprocess.failures_by_host import HostFailures, hosts_of_failure
from d2i.preprocess.plan.planner import Plan


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
