"""The rate limit of each host: how often it is asked, its backoff, and when it counts as dead.

One limiter knows some of a job's hosts, or all; sharded over actors, all workers share them. Must
not ask anything itself.
"""

from __future__ import annotations

import heapq
import itertools
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from d2i.cluster import SharedActor, create_shared, num_session_cores

_CORES_PER_LIMITER = 16
_MAX_LIMITERS = 16
"""All of them are beside the driver, and have its clock."""


@dataclass(frozen=True)
class ShardedRateLimiter:
    """The manners that all workers keep together.

    Args:
        limiters: One at least.
        num_trouble_hosts: As their limits'.
    """

    limiters: tuple[SharedActor[RateLimiter], ...]
    num_trouble_hosts: int

    def of(self, host: str) -> SharedActor[RateLimiter]:
        """Return the book of a host, the same one for all workers."""
        return self.limiters[zlib.crc32(host.encode()) % len(self.limiters)]

    def outage_reason(self, *, of_names: bool) -> str | None:
        """Say what looks like trouble of this machine's own network; see `detect_outage`."""
        signs = [limiter.call("network_health", of_names=of_names) for limiter in self.limiters]
        return detect_outage(signs, self.num_trouble_hosts, of_names=of_names)


def create_shared_limiter(limiter: RateLimiter, *, num_workers: int | None) -> ShardedRateLimiter:
    """Make books that begin as one does common to all workers of the session that is open.

    Args:
        limiter: What each begins as.
        num_workers: As the pool's.
    """
    fitting = num_session_cores(num_workers=num_workers) // _CORES_PER_LIMITER
    num_limiters = min(max(fitting, 1), _MAX_LIMITERS)
    limiters = tuple(create_shared(limiter, num_workers=num_workers) for _ in range(num_limiters))
    return ShardedRateLimiter(limiters, limiter.limits.num_trouble_hosts)


Outcome = Literal["reached", "unreached", "unnamed"]
"""What a host showed of our own network; `unnamed`: its name led nowhere, or where none may."""

_NUM_BEGUN = 4096
"""Hosts whose answers are still waited for, at most."""
_SHARE_UNREACHED = 0.9
_FEW_HOSTS = 8
"""That many hosts, and not one of them reached, are enough to stop (ours)."""


@dataclass(frozen=True)
class NetworkHealth:
    """What a book has seen of our own network.

    Args:
        lost: What all requests go through and cannot be reached, if there is such a thing.
        contacts: When hosts were asked, and what that showed: the last ones first.
    """

    lost: str | None
    contacts: list[tuple[float, Outcome]]


def detect_outage(
    signs: Sequence[NetworkHealth], window: int, *, of_names: bool = False
) -> str | None:
    """Say what looks like trouble of this machine's own network rather than dead addresses.

    The hosts count in the order in which they were asked: those that answer do so long before
    those that do not, and the last words of a shard are all of dead hosts.

    Args:
        signs: Of all books.
        window: So many different hosts, asked one after the other, show it; 0: none do.
        of_names: Whether only names that led nowhere are of interest.
    """
    for of_limiter in signs:
        if of_limiter.lost:
            return of_limiter.lost
    latest = heapq.merge(
        *(of_limiter.contacts for of_limiter in signs), key=lambda contact: contact[0], reverse=True
    )
    contacts = [outcome for _, outcome in itertools.islice(latest, window)]
    if not contacts or (of_names and "unreached" in contacts):
        return None
    num_failed = len(contacts) - contacts.count("reached")
    is_outage = (
        num_failed >= min(_FEW_HOSTS, window)
        if num_failed == len(contacts)
        else len(contacts) == window and num_failed >= _SHARE_UNREACHED * window
    )
    if not is_outage:
        return None
    return f"{num_failed} of the last {len(contacts)} different hosts could not be reached"


@dataclass(frozen=True)
class HostLimits:
    """What one host is spared.

    Args:
        requests_per_s: The most requests a second, over the whole job.
        num_failures: Requests in a row that never reached it, or wishes for peace in a row, until
            it counts as dead.
        dead_s: How long a dead host is not asked again, in seconds.
        max_retry_after_s: A host that wants longer peace than this counts as dead for so long.
        num_trouble_hosts: So many different hosts, asked one after the other, show whether the
            trouble is ours; 0: none do.
    """

    requests_per_s: float
    num_failures: int
    dead_s: float
    max_retry_after_s: float
    num_trouble_hosts: int


@dataclass
class HostState:
    """What is known of one host; times on the limiter's clock, in seconds."""

    next_free: float = 0.0
    backoff_until: float = 0.0
    num_unreached: int = 0
    num_backoffs: int = 0
    num_answers: int = 0
    open_until: float = 0.0

    def record_failure(self, limits: HostLimits, now: float) -> None:
        """Count a request that never reached the host; too many in a row, and it counts as dead."""
        self.num_unreached += 1
        if self.num_unreached >= limits.num_failures:
            self.open_circuit_breaker(now + limits.dead_s)

    def open_circuit_breaker(self, until: float) -> None:
        """Count the host as dead, asked by nobody, until then."""
        self.open_until = max(self.open_until, until)

    def begin_backoff(self, for_s: float, limits: HostLimits, now: float) -> None:
        """Start a backoff. After too many in a row the host counts as dead: waiters hold a thread.

        They are in a row where it gave fewer answers in between than it now wants seconds (our
        default: an answer pays for a second).
        """
        # What was under way when the last one began says nothing new.
        if now >= self.backoff_until:
            self.num_backoffs = 1 if self.num_answers >= for_s else self.num_backoffs + 1
            self.num_answers = 0
        if for_s > limits.max_retry_after_s:
            # Nobody waits for so long: the host is left alone, and asked in a later run.
            self.open_circuit_breaker(now + for_s)
        if self.num_backoffs >= limits.num_failures:
            self.open_circuit_breaker(now + limits.dead_s)
        self.backoff_until = max(self.backoff_until, now + for_s)
        self.next_free = max(self.next_free, self.backoff_until)


@dataclass
class RateLimiter:
    """Hands out turns to ask a host. Its clock is its own, so workers need no common one.

    Args:
        limits: What one host is spared.
        mirror: The host of which the pictures come that a corpus names as files, if it is one.
    """

    limits: HostLimits
    mirror: str | None = None
    _hosts: dict[str, HostState] = field(default_factory=dict)
    _begun: dict[str, tuple[float, Outcome | None]] = field(default_factory=dict)
    _proxy: HostState = field(default_factory=HostState)
    _num_mirror_failures: int = 0
    _has_mirror_answered: bool = False

    def acquire(self, host: str, timeout_s: float, *, is_named: bool = True) -> float | None:
        """Take the next turn of a host, unless it is further away than `timeout_s`.

        Args:
            host: As `guard.Target.netloc` names it.
            timeout_s: How long the caller can wait, in seconds.
            is_named: Whether an address names it, and not another host that sends us on: only
                of such hosts is it counted how many cannot be reached.

        Returns:
            How long to wait before asking, in seconds, and no turn is taken if that is beyond
            `timeout_s`; None if the host is dead for now or wants longer peace than anybody
            waits for, or the proxy is dead.
        """
        now = time.monotonic()
        state = self._hosts.setdefault(host, HostState())
        if now < max(state.open_until, self._proxy.open_until):
            return None
        if state.backoff_until - now > self.limits.max_retry_after_s:
            return None
        turn = max(now, state.next_free)
        if turn - now <= timeout_s:
            state.next_free = turn + 1.0 / self.limits.requests_per_s
            if is_named:
                self._begin(host)
        return turn - now

    def in_backoff(self, host: str) -> bool:
        """Say whether a host asked for peace, or died, after a turn was taken that has come."""
        state = self._hosts.setdefault(host, HostState())
        return time.monotonic() < max(state.backoff_until, state.open_until)

    def report(self, host: str, outcome: Outcome, *, retry_after_s: float = 0.0) -> None:
        """Say what a request showed of a host, and for how long it wants peace, in seconds."""
        now = time.monotonic()
        state = self._hosts.setdefault(host, HostState())
        self._begun[host] = (self._begun.get(host, (now, None))[0], outcome)
        if host == self.mirror:
            self._record_mirror(outcome)
        if outcome == "reached":
            state.num_unreached = self._proxy.num_unreached = 0
        elif outcome == "unreached":
            state.record_failure(self.limits, now)
        if retry_after_s > 0.0:
            state.begin_backoff(retry_after_s, self.limits, now)
        elif outcome == "reached":
            state.num_answers += 1

    def report_proxy_unreached(self) -> None:
        """Say that the proxy took no connection; of the host that tells nothing."""
        self._proxy.record_failure(self.limits, time.monotonic())

    def network_health(self, *, of_names: bool = False) -> NetworkHealth:
        """Say what was seen of this machine's own network.

        Args:
            of_names: Whether only names that led nowhere are of interest.
        """
        window = self.limits.num_trouble_hosts
        known = [(begun_s, outcome) for begun_s, outcome in self._begun.values() if outcome]
        lost: str | None = None
        if self._proxy.num_unreached >= self.limits.num_failures and not of_names:
            lost = f"the proxy could not be reached {self._proxy.num_unreached} times in a row"
        elif window and self._is_mirror_lost(of_names=of_names):
            lost = f"the mirror {self.mirror} could not be reached (is fetch.mirror spelt right?)"
        return NetworkHealth(lost, heapq.nlargest(window, known, key=lambda contact: contact[0]))

    def _record_mirror(self, outcome: Outcome) -> None:
        is_reached = outcome == "reached"
        self._has_mirror_answered |= is_reached
        self._num_mirror_failures = 0 if is_reached else self._num_mirror_failures + 1

    def _is_mirror_lost(self, *, of_names: bool) -> bool:
        """Say whether it never answered, or fails again and again: one host, but all pictures."""
        if self.mirror is None:
            return False
        if of_names and self._begun.get(self.mirror, (0.0, None))[1] != "unnamed":
            return False
        few = self.limits.num_failures if self._has_mirror_answered else 1
        return self._num_mirror_failures >= few

    def _begin(self, host: str) -> None:
        # What it showed before holds until its answer: a host that is asked all the time has one.
        self._begun[host] = (time.monotonic(), self._begun.pop(host, (0.0, None))[1])
        if len(self._begun) > _NUM_BEGUN:
            del self._begun[next(iter(self._begun))]
