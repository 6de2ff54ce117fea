"""Downloader: the URLs of one image, tried in order, with rate limit and Retry-After.

A host's `X-Robots-Tag` opts its images out of collections such as this.
"""

from __future__ import annotations

import itertools
import re
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from d2i.fetch.http_client import Limits, Response, get
from d2i.fetch.known_placeholders import KnownPlaceholders
from d2i.fetch.rate_limiter import Outcome, ShardedRateLimiter
from d2i.fetch.result import UNREACHED, FetchError, FetchResult, is_transient
from d2i.fetch.ssrf_guard import Target
from d2i.fetch.transport import Transport
from d2i.images.decode import begins_as_image, no_image

_BUSY = (429, 503)
_DEFAULT_BACKOFF_S = 1.0
_UNNAMED = ("no_such_host", "refused_address")
"""Failures of a host name: one such host proves nothing, many point to a fault of our own DNS."""
_OUR_NAME = "d2i"
"""User agent name by which a host may address d2i alone."""
_DIRECTIVES = frozenset({"noai", "noimageai", "noindex", "noimageindex", "none"})
_VALUED = frozenset({"unavailable_after", "max-snippet", "max-image-preview", "max-video-preview"})
"""Directives with a value after a colon; they are not user agent names."""
_NAME = re.compile(r"[a-z][a-z0-9_.-]*", re.IGNORECASE)


@dataclass(frozen=True)
class RetryPolicy:
    """Retry policy for a busy host (429, 503).

    Args:
        num_attempts: Maximum number of attempts per URL.
        max_retry_after_s: Longest backoff to wait for; a host that asks for more is left to a later
            run.
    """

    num_attempts: int
    max_retry_after_s: float


@dataclass(frozen=True)
class Downloader:
    """Downloads images by URL. Thread-safe.

    Args:
        limits: Time and size limits of one URL.
        retry_policy: When to retry a busy host.
        route: Transport to the hosts.
        hosts: Rate limiter that all workers share.
        placeholders: Known placeholder images.
        slots: One connection slot per request in flight; a request that waits for its host holds
            none.
    """

    limits: Limits
    retry_policy: RetryPolicy
    route: Transport
    hosts: ShardedRateLimiter
    placeholders: KnownPlaceholders
    slots: threading.Semaphore

    def fetch(self, urls: Sequence[str], deadline: float) -> FetchResult:
        """Return the image of the first URL that has one, or else a failure.

        The failure is the last transient one, or the last one if all are permanent. Only the first
        bytes are checked here: decoding comes too late to try another URL.

        Args:
            urls: URLs of the image, best first.
            deadline: Time on the monotonic clock after which no request starts.
        """
        failure = FetchResult(None, "no_address", "the instance has no URL", attempts=0)
        attempts = 0
        for url in urls:
            download = _Download(self, url, deadline)
            found = download.fetch(attempts)
            if found.data is not None:
                return found
            attempts = found.attempts
            # A transient failure outweighs a permanent one: a later run may still get the image.
            if not (is_transient(failure.reason) and not is_transient(found.reason)):
                failure = found
            failure = failure.after(attempts)
        return failure


@dataclass
class _Download:
    """All requests for one URL."""

    fetcher: Downloader
    url: str
    deadline: float
    requested: list[Target] = field(default_factory=list)
    has_slot: bool = False

    def fetch(self, attempts: int) -> FetchResult:
        """Request the URL, with retries while its host is busy; `attempts` were made before."""
        for attempt in itertools.count(1):
            try:
                answer = self._request()
                _check_answer(answer, self.fetcher.placeholders)
            except FetchError as err:
                attempts += bool(self.requested)
                if attempt < self.fetcher.retry_policy.num_attempts and self._is_worth_waiting(err):
                    continue
                final_url = err.final_url or self.url
                return FetchResult(None, err.reason, str(err), attempts, err.status, final_url)
            break
        return FetchResult(answer.body, "ok", "", attempts + 1, answer.status, answer.final_url)

    def _is_worth_waiting(self, error: FetchError) -> bool:
        wait_s = _backoff_s(error)
        return (
            error.status in _BUSY
            and wait_s <= self.fetcher.retry_policy.max_retry_after_s
            and time.monotonic() + wait_s < self.deadline
        )

    def _request(self) -> Response:
        self.requested = []
        try:
            answer = get(self.url, self.fetcher.limits, self.fetcher.route, self._wait_for_turn)
        except FetchError as err:
            self._report(err)
            raise
        finally:
            self._release_slot()
        self._report(None)
        return answer

    def _wait_for_turn(self, target: Target) -> None:
        """Wait for the host's rate limit, and for a connection slot."""
        self._release_slot()
        if self.requested:
            # It redirected the request, so it was reached.
            self._call("report", self.requested[-1].netloc, "reached")
        host = target.netloc
        while True:
            wait_s = self._wait_for_rate_limit(host)
            if wait_s > 0.0:
                time.sleep(wait_s)
            has_waited = self._take_slot() or wait_s > 0.0
            # During the wait the host may have gone into backoff, or been marked dead.
            if not (has_waited and self._call("in_backoff", host)):
                break
            self._release_slot()
        self.requested.append(target)

    def _take_slot(self) -> bool:
        """Wait for a connection slot; return whether there was none at once."""
        slots = self.fetcher.slots
        self.has_slot = slots.acquire(blocking=False)
        if self.has_slot:
            return False
        self.has_slot = slots.acquire(timeout=self._timeout_s())
        if not self.has_slot:
            raise FetchError("shard_timeout", "no connection slot became free in time")
        return True

    def _release_slot(self) -> None:
        if self.has_slot:
            self.has_slot = False
            self.fetcher.slots.release()

    def _timeout_s(self) -> float:
        return max(self.deadline - time.monotonic(), 0.0)

    def _wait_for_rate_limit(self, host: str) -> float:
        """Return how long to wait before the request to a host, in seconds."""
        timeout_s = self._timeout_s()
        wait_s: float | None = self._call("acquire", host, timeout_s, is_named=not self.requested)
        if wait_s is None:
            raise FetchError("dead_host", f"{host} did not answer earlier, or was busy too often")
        if wait_s > timeout_s:
            raise FetchError("shard_timeout", f"the request queue of {host} is too long")
        return wait_s

    def _report(self, error: FetchError | None) -> None:
        """Report the outcome for the last requested host; for a redirect target, only a success.

        The redirecting host chooses target and time, and could make any host look dead.
        """
        if not self.requested:
            return
        if error is not None and error.reason == "proxy_unreached":
            self.fetcher.hosts.of(self.requested[-1].netloc).call("report_proxy_unreached")
            return
        outcome = _outcome(error)
        if outcome is None or (outcome != "reached" and len(self.requested) > 1):
            return
        wait_s = 0.0 if error is None else _backoff_s(error)
        self._call("report", self.requested[-1].netloc, outcome, retry_after_s=wait_s)

    def _call(self, method: str, host: str, *args: object, **kwargs: object) -> Any:
        """Call the limiter shard that has a host."""
        return self.fetcher.hosts.of(host).call(method, host, *args, **kwargs)


def _outcome(error: FetchError | None) -> Outcome | None:
    """Return what the end of a request shows about the requested host, if anything."""
    if error is None or error.was_reached:
        return "reached"
    if error.reason in _UNNAMED:
        return "unnamed"
    return "unreached" if error.reason in UNREACHED else None


def _backoff_s(error: FetchError) -> float:
    """Return the backoff that a host asks for, in seconds; our default if a busy one gives none."""
    if error.retry_after_s is not None:
        return error.retry_after_s
    return _DEFAULT_BACKOFF_S if error.status in _BUSY else 0.0


def _check_answer(answer: Response, placeholders: KnownPlaceholders) -> None:
    """Refuse what robots rules forbid, a known placeholder, or a page instead of an image."""
    if is_disallowed(answer.headers.get_all("X-Robots-Tag", [])):
        raise FetchError(
            "robots", "X-Robots-Tag forbids it", answer.status, final_url=answer.final_url
        )
    if why := placeholders.why(answer.body, answer.final_url):
        raise FetchError("placeholder", why, answer.status, final_url=answer.final_url)
    if not begins_as_image(answer.body):
        raise FetchError(
            "not_an_image", no_image(answer.body), answer.status, final_url=answer.final_url
        )


def is_disallowed(values: Iterable[str]) -> bool:
    """Return whether a value of the header forbids the image, to all or to d2i by name."""
    return any(_is_forbidding(value) for value in values)


def _is_forbidding(value: str) -> bool:
    agent: str | None = None
    for part in value.split(","):
        name, colon, directive = (piece.strip().lower() for piece in part.partition(":"))
        if name in _VALUED:
            continue
        if colon and _NAME.fullmatch(name):
            # The directives that follow apply to this user agent alone.
            agent = name
        elif colon:
            # A colon in the time of a date.
            continue
        field_name = directive if colon else name
        if agent in (None, _OUR_NAME) and field_name in _DIRECTIVES:
            return True
    return False
