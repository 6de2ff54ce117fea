"""Progress of a running job: counted by all workers."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from d2i.cluster import SharedActor
from d2i.io.progress_bar import Counts
from d2i.preprocess.workers.messages import ShardResult


@dataclass
class Tally:
    """Number of usable images so far, and failures by reason; one tally for a whole job."""

    num_ok: int = 0
    failures: Counter[str] = field(default_factory=Counter)

    def add(self, reasons: Iterable[str]) -> None:
        """Count the results of some images: `ok`, or the class of the failure."""
        counts = Counter(reasons)
        self.num_ok += counts.pop("ok", 0)
        self.failures.update(counts)

    def state(self) -> tuple[int, dict[str, int]]:
        """Return both counts."""
        return self.num_ok, dict(self.failures)


@dataclass
class JobProgress:
    """Progress of a job."""

    num_instances: int
    num_done: int = 0
    num_images: int = 0
    failures: dict[str, int] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)

    def take(self, result: ShardResult) -> None:
        """Count one finished shard."""
        self.num_done += result.num_written + sum(result.failures.values())

    def refresh(self, tally: SharedActor[Tally]) -> None:
        """Update the fetch counts from the tally."""
        num_ok, self.failures = tally.call("state")
        self.num_images = num_ok + sum(self.failures.values())

    def line(self) -> str:
        """Return counts, rates, time left and the failed images by reason."""
        passed_s = max(time.monotonic() - self.started, 1e-9)
        rate = self.num_done / passed_s
        left = f"{(self.num_instances - self.num_done) / rate:.0f} s left" if rate else "… left"
        failed = ", ".join(f"{n} {reason}" for reason, n in sorted(self.failures.items()))
        return (
            f"{self.num_done}/{self.num_instances} instances  {rate:.0f}/s  {left}"
            f"  fetched: {self.num_images} images, {self.num_images / passed_s:.0f}/s"
            f"  failed: {failed or 'none'}"
        )

    def counts(self) -> Counts:
        """Return the same for a progress bar."""
        passed_s = max(time.monotonic() - self.started, 1e-9)
        return Counts(
            line=self.line(),
            done=self.num_done,
            total=self.num_instances,
            unit="instances",
            started=self.started,
            failures=dict(sorted(self.failures.items())),
            note=f"fetched: {self.num_images} images, {self.num_images / passed_s:.0f}/s",
        )
