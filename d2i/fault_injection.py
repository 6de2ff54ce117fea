"""Fault injection: named points at which a test can make the work fail, wait or die.

Set by `--fault POINT:error|sleep|kill:N` of the entry points and passed down as an argument; no
inner code reads the environment.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import dataclass, field
from typing import Literal, get_args

from d2i.errors import ConfigError

Point = Literal[
    "fetch.picture",
    "fetch.shard",
    "encode.images",
    "ledger.written",
    "shard.written",
    "shard.tar",
    "shard.index",
    "shard.commit",
    "job.shard_done",
    "same_pictures.record_removed",
    "manifest.checksum",
    "manifest.written",
    "train.step_done",
    "train.checkpoint_written",
    "eval.task_drawn",
    "eval.pictures_written",
    "eval.task_written",
    "eval.task_done",
]
Action = Literal["error", "sleep", "kill"]
_SLEEP_S = 3600.0
WAITS = "waiting at fault point "
"""Text on stderr, before the point's name, of a process that sleeps."""


class FaultError(RuntimeError):
    """The error that a fault point raises on request."""


@dataclass
class Fault:
    """A fault that is triggered once, the N-th time a process passes a point.

    Args:
        point: The fault point.
        action: `error` raises, `sleep` waits an hour, `kill` is SIGKILL to this process.
        nth: The pass that triggers it, from 1.
    """

    point: Point
    action: Action
    nth: int
    num_passed: int = field(default=0)

    def trigger_at(self, point: str) -> None:
        """Trigger the fault if this is the N-th pass of its point."""
        if self.is_due(point):
            self.act()

    def is_due(self, point: str) -> bool:
        """Count a pass; return whether it is the N-th one of the fault's point."""
        if point != self.point:
            return False
        self.num_passed += 1
        return self.num_passed == self.nth

    def act(self) -> None:
        """Kill this process, wait, or raise `FaultError`, depending on the action."""
        if self.action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.action == "sleep":
            # The only sign that it waits.
            sys.stderr.write(f"{WAITS}{self.point}\n")
            sys.stderr.flush()
            time.sleep(_SLEEP_S)
        raise FaultError(f"injected at {self.point}")


def parse_fault(text: str | None) -> Fault | None:
    """Parse `POINT:ACTION:N`.

    Raises:
        ConfigError: If the form, the point or the action is unknown.
    """
    if text is None:
        return None
    point, _, rest = text.partition(":")
    action, _, nth = rest.partition(":")
    if point not in get_args(Point) or action not in get_args(Action) or not nth.isdigit():
        raise ConfigError(
            f"--fault {text}: expected POINT:error|sleep|kill:N with a point of "
            f"{', '.join(get_args(Point))}"
        )
    return Fault(point, action, int(nth))  # type: ignore[arg-type]
