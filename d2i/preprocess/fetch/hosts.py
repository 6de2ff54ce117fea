"""Manners, kept by all workers together: how often a host is asked, and when it is left alone.

One `HostBook` serves a whole job. Must not ask anything itself.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

_WINDOW = 20
"""The last word of so many different hosts shows whether the trouble is ours (ours)."""
_SHARE_UNREACHED = 0.9
_FEW_HOSTS = 8
"""That many hosts, and not one of them reached, are enough to stop (ours)."""


@dataclass(frozen=True)
class HostLimits:
    """What one host is spared.

    Args:
        requests_per_s: The most requests a second, over the whole job.
        num_failures: Requests in a row that never reached it, until it counts as dead.
        dead_s: How long a dead host is not asked again, in seconds.
        max_retry_after_s: A host that wants longer peace than this counts as dead for so long.
    """

    requests_per_s: float
    num_failures: int
    dead_s: float
    max_retry_after_s: float


@dataclass
class _Host:
    next_free: float = 0.0
    num_unreached: int = 0
    dead_until: float = 0.0


@dataclass
class HostBook:
    """Hands out turns to ask a host. Its clock is its own, so workers need no common one."""

    limits: HostLimits
    _hosts: dict[str, _Host] = field(default_factory=dict)
    _recent: dict[str, bool] = field(default_factory=dict)

    def reserve(self, host: str) -> float | None:
        """Take the next turn of a host.

        Returns:
            How long to wait before asking, in seconds; None if the host is dead for now.
        """
        now = time.monotonic()
        state = self._hosts.setdefault(host, _Host())
        if now < state.dead_until:
            return None
        turn = max(now, state.next_free)
        state.next_free = turn + 1.0 / self.limits.requests_per_s
        return turn - now

    def report(self, host: str, *, reached: bool, retry_after_s: float = 0.0) -> None:
        """Say how a request ended: whether the host answered, and for how long it wants peace."""
        now = time.monotonic()
        state = self._hosts.setdefault(host, _Host())
        self._recent.pop(host, None)
        self._recent[host] = reached
        if len(self._recent) > _WINDOW:
            del self._recent[next(iter(self._recent))]
        if reached:
            state.num_unreached = 0
        else:
            state.num_unreached += 1
            if state.num_unreached >= self.limits.num_failures:
                state.dead_until = now + self.limits.dead_s
        if retry_after_s > self.limits.max_retry_after_s:
            # Nobody waits for so long: the host is left alone, and asked in a later run.
            state.dead_until = now + retry_after_s
        state.next_free = max(state.next_free, now + retry_after_s)

    def trouble(self) -> str | None:
        """Say what looks like trouble of this machine's own network rather than dead addresses."""
        contacts = list(self._recent.values())
        num_unreached = contacts.count(False)
        is_trouble = (
            num_unreached >= _FEW_HOSTS
            if all(not reached for reached in contacts)
            else len(contacts) == _WINDOW and num_unreached >= _SHARE_UNREACHED * _WINDOW
        )
        if not is_trouble:
            return None
        return f"{num_unreached} of the last {len(contacts)} different hosts could not be reached"
