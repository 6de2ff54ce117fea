"""Result of fetching one image: its bytes, or the reason of its failure, permanent or transient."""

from __future__ import annotations

from dataclasses import dataclass, replace

_TRANSIENT_STATUS = {408, 425, 429}
_TRANSIENT = frozenset(
    {
        "connect",
        "cut_body",
        "dead_host",
        "decode_timeout",
        "dns_failed",
        "engine_error",
        "lfs_pointer",
        "proxy_refused",
        "proxy_unreached",
        "read_error",
        "shard_timeout",
        "timeout",
        "tls",
        "too_slow",
    }
)
UNREACHED = frozenset({"connect", "dns_failed", "timeout", "tls"})
"""Reasons when a host, or from this machine any host, cannot be reached; unless
`FetchError.was_reached`."""


class FetchError(Exception):
    """A request failed.

    Args:
        reason: Reason in the ledger.
        detail: Human-readable detail.
        status: HTTP status, if there was one.
        retry_after_s: Backoff that the host asks for, in seconds.
        final_url: Last URL requested, or refused, after redirects.

    Attributes:
        was_reached: Whether the last requested host had answered before the failure.
    """

    def __init__(
        self,
        reason: str,
        detail: str,
        status: int | None = None,
        retry_after_s: float | None = None,
        final_url: str | None = None,
    ) -> None:
        super().__init__(detail)
        self.reason = reason
        self.status = status
        self.retry_after_s = retry_after_s
        self.final_url = final_url
        self.was_reached = False


def is_transient(reason: str) -> bool:
    """Return whether a later retry may help: not if the image is gone, refused or broken."""
    kind, _, status = reason.partition("http_")
    if not kind and status.isdigit():
        return int(status) in _TRANSIENT_STATUS or int(status) >= 500
    return reason in _TRANSIENT


@dataclass(frozen=True)
class FetchResult:
    """Bytes of an image, or the reason why there are none.

    Args:
        data: The source bytes.
        reason: `ok`, or the reason of the failure.
        detail: Human-readable detail.
        attempts: Requests that were sent; 1 for a file.
        http_status: HTTP status of the last answer.
        final_url: Last URL requested, after redirects.
    """

    data: bytes | None
    reason: str = "ok"
    detail: str = ""
    attempts: int = 1
    http_status: int | None = None
    final_url: str | None = None

    def refused(self, reason: str, detail: str) -> FetchResult:
        """Return this result as a failure, without the bytes."""
        return replace(self, data=None, reason=reason, detail=detail)

    def without_data(self) -> FetchResult:
        """Return a copy without the bytes."""
        return replace(self, data=None)

    def with_data(self, data: bytes | None) -> FetchResult:
        """Return a copy with the given bytes."""
        return replace(self, data=data)

    def after(self, attempts: int) -> FetchResult:
        """Return a copy with the given number of attempts."""
        return replace(self, attempts=attempts)
