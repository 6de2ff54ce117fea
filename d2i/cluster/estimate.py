"""Estimate of a job before it starts: workers, rounds, memory in flight, time and cost.

The rate is assumed, or the one saved when this user last ran the same work.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import platform
import time
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from d2i.cluster.session import Capacity
from d2i.io import storage


@dataclass(frozen=True)
class Rate:
    """Measured speed of one worker.

    Args:
        items_per_s: Instances per second of one worker, without start-up.
        num_items: Number of instances it was measured over.
        num_workers: Number of workers at once.
        host: Host of the driver that measured it.
        date: Day of the measurement, YYYY-MM-DD.
    """

    items_per_s: float
    num_items: int
    num_workers: int
    host: str
    date: str


@dataclass
class Throughput:
    """Measures a rate without start-up.

    Start-up ends once as many tasks have finished as there are workers.
    """

    num_workers: int
    clock: Any = time.monotonic
    _num_tasks: int = 0
    _num_items: int = 0
    _began_s: float = field(default=0.0)

    def add(self, num_items: int) -> None:
        """Count a finished task."""
        self._num_tasks += 1
        if self._num_tasks > self.num_workers:
            self._num_items += num_items
        else:
            self._began_s = self.clock()

    def rate(self) -> Rate | None:
        """Return the rate so far; None before two tasks per worker have finished (our default)."""
        passed_s = self.clock() - self._began_s
        if self._num_tasks < 2 * self.num_workers or not self._num_items or passed_s <= 0:
            return None
        per_worker = self._num_items / passed_s / self.num_workers
        today = datetime.now(UTC).date().isoformat()
        return Rate(per_worker, self._num_items, self.num_workers, platform.node(), today)


def save_rate(decided_by: dict[str, Any], rate: Rate) -> None:
    """Save a rate in the user's cache, in place of the last one."""
    try:
        storage.write_bytes(str(_path(decided_by)), json.dumps(asdict(rate)).encode())
    except OSError as err:
        # Only a later estimate is lost.
        logging.getLogger(__name__).warning("cannot save the rate of this work: %s", err)


def find_rate(decided_by: dict[str, Any]) -> Rate | None:
    """Return the saved rate of the same work; None if there is none, or it cannot be read."""
    try:
        return msgspec.json.decode(_path(decided_by).read_bytes(), type=Rate)
    except (OSError, msgspec.DecodeError):
        return None


def _path(decided_by: dict[str, Any]) -> Path:
    words = json.dumps(decided_by, sort_keys=True).encode()
    return storage.cache_directory("rates") / f"{hashlib.sha256(words).hexdigest()[:16]}.json"


@dataclass(frozen=True)
class Work:
    """Work that is left.

    Args:
        num_items: Number of instances.
        num_tasks: Number of tasks that they are split into.
        bytes_in_flight: Most bytes in the object stores for one worker.
    """

    num_items: int
    num_tasks: int
    bytes_in_flight: int


@dataclass(frozen=True)
class RateOverrides:
    """Values that the user gives.

    Args:
        items_per_s: Instances per second of one worker; None takes the measured rate.
        price_per_node_hour: In any currency; None estimates no cost.
    """

    items_per_s: float | None = None
    price_per_node_hour: float | None = None


@dataclass(frozen=True)
class Forecast:
    """Estimate of a job. Time and cost are None if no rate is known.

    Args:
        num_rounds: Tasks of the busiest worker.
        bytes_in_flight: Most bytes in all object stores at once.
        items_per_s: Instances per second of one worker.
        rate_from: Source of that rate, in words.
        time_s: From the first task to the last.
        cost: Of all nodes for that time.
    """

    work: Work
    offer: Capacity
    num_workers: int
    num_rounds: int
    bytes_in_flight: int
    items_per_s: float | None
    rate_from: str
    time_s: float | None
    cost: float | None


def forecast(
    work: Work, offer: Capacity, measured: Rate | None, assumed: RateOverrides
) -> Forecast:
    """Return the estimate of a job on the given capacity."""
    num_workers = offer.num_busy(work.num_tasks)
    num_rounds = math.ceil(work.num_tasks / num_workers) if num_workers else 0
    rate = assumed.items_per_s or (measured.items_per_s if measured else None)
    # A round takes as long as one task, even if not all workers have one.
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


def _rate_from(measured: Rate | None, assumed: RateOverrides) -> str:
    if assumed.items_per_s:
        return "assumed (--rate)"
    if measured is None:
        return (
            "unknown: this work was never measured here; run a part with --limit, or set --rate N"
        )
    return (
        f"measured by {measured.host} on {measured.date} over {measured.num_items} instances, "
        f"{measured.num_workers} workers at once; other nodes may differ"
    )
