"""Execution of tasks in this process or on Ray. The only package that imports ray."""

from d2i.cluster.actors import ResourceRequest, num_session_cores
from d2i.cluster.pipeline import Consumer, Pipeline, Producer, run_pipeline
from d2i.cluster.pool import (
    JobFault,
    Pool,
    SharedActor,
    Worker,
    create_shared,
    device_of_worker,
    job_fault,
    run_tasks,
    session,
)

__all__ = [
    "Consumer",
    "JobFault",
    "Pipeline",
    "Pool",
    "Producer",
    "ResourceRequest",
    "SharedActor",
    "Worker",
    "create_shared",
    "device_of_worker",
    "job_fault",
    "num_session_cores",
    "run_pipeline",
    "run_tasks",
    "session",
]
