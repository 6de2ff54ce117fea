"""What a job would take: rounds, memory in flight, time and cost, from a rate that is named."""

from __future__ import annotations

import math
from dataclasses import dataclass

from d2i.cluster.offer import Offer
from d2i.cluster.rates import Rate


@dataclass(frozen=True)
class Work:
    """What is left to do.

    Args:
        num_items: Instances.
        num_tasks: Tasks that they are dealt out in.
        bytes_in_flight: The most that lies in the object stores for one worker.
    """

    num_items: int
    num_tasks: int
    bytes_in_flight: int


@dataclass(frozen=True)
class Assumed:
    """What the user gives.

    Args:
        items_per_s: Instances a second of one worker; None takes what was measured.
        price_per_node_hour: In any currency; None asks for no cost.
    """

    items_per_s: float | None = None
    price_per_node_hour: float | None = None


@dataclass(frozen=True)
class Forecast:
    """What it would take. Times and costs are None where no rate is known.

    Args:
        num_rounds: Tasks that the busiest worker does.
        bytes_in_flight: The most in all object stores at once.
        items_per_s: Instances a second of one worker.
        rate_from: Where that is from, in words.
        time_s: From the first task to the last.
        cost: Of all nodes for that time.
    """

    work: Work
    offer: Offer
    num_workers: int
    num_rounds: int
    bytes_in_flight: int
    items_per_s: float | None
    rate_from: str
    time_s: float | None
    cost: float | None


def forecast(work: Work, offer: Offer, measured: Rate | None, assumed: Assumed) -> Forecast:
    """Return what the work would take of the offer."""
    num_workers = min(offer.num_workers, work.num_tasks)
    num_rounds = math.ceil(work.num_tasks / num_workers) if num_workers else 0
    rate = assumed.items_per_s or (measured.items_per_s if measured else None)
    # A round takes as long as one task, also where not all workers have one.
    items_a_task = work.num_items / work.num_tasks if work.num_tasks else 0.0
    time_s = num_rounds * items_a_task / rate if rate else None
    price = assumed.price_per_node_hour
    return Forecast(
        work=work,
        offer=offer,
        num_workers=num_workers,
        num_rounds=num_rounds,
        bytes_in_flight=num_workers * work.bytes_in_flight,
        items_per_s=rate,
        rate_from=_rate_from(measured, assumed),
        time_s=time_s,
        cost=None if time_s is None or price is None else price * offer.num_nodes * time_s / 3600,
    )


def _rate_from(measured: Rate | None, assumed: Assumed) -> str:
    if assumed.items_per_s:
        return "assumed, as --rate says"
    if measured is None:
        return "unknown: no such work was measured here; run a part with --limit, or give --rate N"
    return (
        f"measured by {measured.host} on {measured.date} over {measured.num_items} instances, "
        f"{measured.num_workers} workers at once; other nodes may differ"
    )
