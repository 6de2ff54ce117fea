"""Where work runs: in this process, or on Ray. The only package that imports ray."""

from d2i.cluster.actors import ResourceRequest, num_session_cores
from d2i.cluster.pipeline import Feeder, Finisher, Stages, run_stages
from d2i.cluster.pool import (
    JobFault,
    Pool,
    Shared,
    Worker,
    device_of_worker,
    job_fault,
    run_tasks,
    session,
    share,
)

__all__ = [
    "Feeder",
    "Finisher",
    "JobFault",
    "Pool",
    "ResourceRequest",
    "Shared",
    "Stages",
    "Worker",
    "device_of_worker",
    "job_fault",
    "num_session_cores",
    "run_stages",
    "run_tasks",
    "session",
    "share",
]
