"""Record issues of a corpus, counted by reason, with the first of each. Must not import torch."""

from __future__ import annotations

from collections import Counter

from d2i.corpora.records import RecordIssue

_NUM_DESCRIBED = 3


class IssueCounter:
    """Counts record issues, and keeps the first one of each reason."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._first: dict[str, RecordIssue] = {}

    def add(self, problem: RecordIssue) -> None:
        """Count one issue."""
        self._counts[problem.reason] += 1
        self._first.setdefault(problem.reason, problem)

    @property
    def counts(self) -> dict[str, int]:
        """Number of issues by reason, sorted by reason."""
        return dict(sorted(self._counts.items()))

    @property
    def first(self) -> dict[str, dict[str, str]]:
        """First issue of each reason, sorted: `where` (file and line or byte) and `detail`."""
        return {
            reason: {"where": problem.where, "detail": problem.detail}
            for reason, problem in sorted(self._first.items())
        }

    def describe(self) -> str:
        """Describe the most common reasons, each with its first case; empty if there is none."""
        named = [
            f"{count} {reason} (first: {self._first[reason].where}: {self._first[reason].detail})"
            for reason, count in self._counts.most_common(_NUM_DESCRIBED)
        ]
        num_others = len(self._counts) - len(named)
        return ", ".join([*named, *([f"{num_others} other reasons"] if num_others else [])])
