"""How many workers there would be, and on what, before any is started."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

from d2i.cluster.actors import ResourceRequest, actor_size, num_workers_of
from d2i.cluster.nodes import list_nodes
from d2i.cluster.pool import session

Unit = Literal["accelerator", "core"]


@dataclass(frozen=True)
class Offer:
    """What a job would get.

    Args:
        num_nodes: Nodes that are there, with or without workers.
        num_workers: Workers, as asked or as many as fit.
        unit: What each of them occupies.
        object_store_bytes: Memory of all object stores; 0 where Ray is not started yet.
    """

    num_nodes: int
    num_workers: int
    unit: Unit
    object_store_bytes: int


def look_at_offer(num_workers: int | None, ray_address: str | None) -> Offer:
    """Return what a job would get on a running cluster, or on this machine, where none is started.

    Args:
        num_workers: As the pool's.
        ray_address: As the pool's.

    Raises:
        ClusterError: If the cluster cannot be reached.
    """
    if ray_address is None or num_workers == 0:
        return _offer_here(num_workers)
    with session(num_workers, ray_address):
        return offer_of_session(num_workers)


def offer_of_session(num_workers: int | None) -> Offer:
    """Return what a job gets in the session that is open."""
    if num_workers == 0:
        return _offer_here(0)
    nodes, size = list_nodes(), actor_size(ResourceRequest())
    unit: Unit = "accelerator" if size.num_gpus else "core"
    store_bytes = sum(node.object_store_bytes for node in nodes)
    return Offer(len(nodes), num_workers_of(num_workers, size), unit, store_bytes)


def _offer_here(num_workers: int | None) -> Offer:
    import torch

    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    fitting = num_gpus or len(os.sched_getaffinity(0))
    unit: Unit = "accelerator" if num_gpus else "core"
    return Offer(1, 1 if num_workers == 0 else num_workers or fitting, unit, 0)
