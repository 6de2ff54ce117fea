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
    peace_until: float = 0.0
    num_unreached: int = 0
    dead_until: float = 0.0

    def note_unreached(self, limits: HostLimits, now: float) -> None:
        """Count a request that never got there; too many in a row, and it counts as dead."""
        self.num_unreached += 1
        if self.num_unreached >= limits.num_failures:
            self.dead_until = now + limits.dead_s


@dataclass
class HostBook:
    """Hands out turns to ask a host. Its clock is its own, so workers need no common one."""

    limits: HostLimits
    _hosts: dict[str, _Host] = field(default_factory=dict)
    _recent: dict[str, bool] = field(default_factory=dict)
    _proxy: _Host = field(default_factory=_Host)

    def reserve(self, host: str, patience_s: float) -> float | None:
        """Take the next turn of a host, unless it is further away than `patience_s`.

        Returns:
            How long to wait before asking, in seconds, and no turn is taken if that is beyond
            `patience_s`; None if the host is dead for now, or the proxy is.
        """
        now = time.monotonic()
        state = self._hosts.setdefault(host, _Host())
        if now < max(state.dead_until, self._proxy.dead_until):
            return None
        turn = max(now, state.next_free)
        if turn - now <= patience_s:
            state.next_free = turn + 1.0 / self.limits.requests_per_s
        return turn - now

    def wants_peace(self, host: str) -> bool:
        """Say whether a host asked for peace, or died, after a turn was taken that has come."""
        state = self._hosts.setdefault(host, _Host())
        return time.monotonic() < max(state.peace_until, state.dead_until)

    def report(self, host: str, *, reached: bool, retry_after_s: float = 0.0) -> None:
        """Say how a request ended: whether the host answered, and for how long it wants peace."""
        now = time.monotonic()
        state = self._hosts.setdefault(host, _Host())
        self._recent.pop(host, None)
        self._recent[host] = reached
        if len(self._recent) > _WINDOW:
            del self._recent[next(iter(self._recent))]
        if reached:
            state.num_unreached = self._proxy.num_unreached = 0
        else:
            state.note_unreached(self.limits, now)
        if retry_after_s > self.limits.max_retry_after_s:
            # Nobody waits for so long: the host is left alone, and asked in a later run.
            state.dead_until = now + retry_after_s
        state.peace_until = max(state.peace_until, now + retry_after_s)
        state.next_free = max(state.next_free, state.peace_until)

    def report_proxy_unreached(self) -> None:
        """Say that the proxy took no connection; of the host that tells nothing."""
        self._proxy.note_unreached(self.limits, time.monotonic())

    def trouble(self) -> str | None:
        """Say what looks like trouble of this machine's own network rather than dead addresses."""
        if self._proxy.num_unreached >= self.limits.num_failures:
            return f"the proxy could not be reached {self._proxy.num_unreached} times in a row"
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
