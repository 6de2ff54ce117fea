"""Where work runs: in this process, or on Ray. The only package that imports ray."""

from d2i.cluster.pool import (
    Pool,
    ResourceRequest,
    Shared,
    Worker,
    device_of_worker,
    run_tasks,
    session,
    share,
)

__all__ = [
    "Pool",
    "ResourceRequest",
    "Shared",
    "Worker",
    "device_of_worker",
    "run_tasks",
    "session",
    "share",
]
