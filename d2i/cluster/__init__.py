"""Execution of tasks in this process or on Ray. The only package that imports ray."""

from d2i.cluster.actors import ResourceRequest
from d2i.cluster.pipeline import Consumer, Producer
from d2i.cluster.pool import Worker, device_of_worker
from d2i.cluster.session import Capacity, Session
from d2i.cluster.shared_actor import JobFault, SharedActor

__all__ = [
    "Capacity",
    "Consumer",
    "JobFault",
    "Producer",
    "ResourceRequest",
    "Session",
    "SharedActor",
    "Worker",
    "device_of_worker",
]
