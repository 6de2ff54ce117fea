"""A fault point that counts over all workers of a job, so that it acts once in the whole job."""

from __future__ import annotations

from dataclasses import dataclass

from d2i.cluster.pool import Shared, share
from d2i.fault_injection import Fault


@dataclass(frozen=True)
class JobFault:
    """One fault for all workers; picklable. Made by `job_fault`."""

    fault: Fault
    passes: Shared[Fault]

    def reach(self, point: str) -> None:
        """Act, in this process, if this is the asked pass of the asked point."""
        if point == self.fault.point and self.passes.call("is_due", point):
            self.fault.act()


def job_fault(fault: Fault, *, num_workers: int | None) -> JobFault:
    """Return a fault that all workers of the session that is open count together."""
    return JobFault(fault, share(fault, num_workers=num_workers))
