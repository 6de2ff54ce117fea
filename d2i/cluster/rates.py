"""How fast a worker was when such work was last done by this user: measured, kept, found again."""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import time
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from d2i import storage


@dataclass(frozen=True)
class Rate:
    """How fast one worker was.

    Args:
        items_per_s: Instances a second of one worker, start-up left out.
        num_items: Over how many it was measured.
        num_workers: How many worked at once.
        host: Whose driver measured it.
        date: When, YYYY-MM-DD.
    """

    items_per_s: float
    num_items: int
    num_workers: int
    host: str
    date: str


@dataclass
class Meter:
    """Measures a rate once as many tasks as there are workers have ended: before was start-up."""

    num_workers: int
    clock: Any = time.monotonic
    _num_tasks: int = 0
    _num_items: int = 0
    _began_s: float = field(default=0.0)

    def take(self, num_items: int) -> None:
        """Count a finished task."""
        self._num_tasks += 1
        if self._num_tasks > self.num_workers:
            self._num_items += num_items
        else:
            self._began_s = self.clock()

    def rate(self) -> Rate | None:
        """Return the rate so far; None before every worker has finished two tasks (ours)."""
        passed_s = self.clock() - self._began_s
        if self._num_tasks < 2 * self.num_workers or not self._num_items or passed_s <= 0:
            return None
        per_worker = self._num_items / passed_s / self.num_workers
        today = datetime.now(UTC).date().isoformat()
        return Rate(per_worker, self._num_items, self.num_workers, platform.node(), today)


def keep_rate(decided_by: dict[str, Any], rate: Rate) -> None:
    """Keep a rate in the user's cache, in place of the one before."""
    try:
        storage.write_bytes(str(_path(decided_by)), json.dumps(asdict(rate)).encode())
    except OSError as err:
        # Only a forecast is lost.
        logging.getLogger(__name__).warning("the rate of this work is not kept: %s", err)


def find_rate(decided_by: dict[str, Any]) -> Rate | None:
    """Return the rate of the same work; None where none is kept, or it cannot be read."""
    try:
        return msgspec.json.decode(_path(decided_by).read_bytes(), type=Rate)
    except (OSError, msgspec.DecodeError):
        return None


def _path(decided_by: dict[str, Any]) -> Path:
    words = json.dumps(decided_by, sort_keys=True).encode()
    return storage.cache_folder("rates") / f"{hashlib.sha256(words).hexdigest()[:16]}.json"
