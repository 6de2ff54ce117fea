"""The result of fetching one image: its bytes, or the reason class, permanent or transient."""

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
"""What a host that cannot be reached looks like, and a machine that reaches nothing; unless
`FetchError.was_reached`."""


class FetchError(Exception):
    """A request failed.

    Args:
        reason: Its class in the ledger.
        detail: What happened, for a person.
        status: The HTTP status, where there was one.
        retry_after_s: How long the host asks to be left alone, in seconds.
        final_url: The last address asked, or refused, after redirects.

    Attributes:
        was_reached: Whether the host that was asked last had answered before it failed.
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
    """Say whether asking again later may help: not for what is gone, refused or broken."""
    kind, _, status = reason.partition("http_")
    if not kind and status.isdigit():
        return int(status) in _TRANSIENT_STATUS or int(status) >= 500
    return reason in _TRANSIENT


@dataclass(frozen=True)
class FetchResult:
    """Bytes of a picture, or why there are none.

    Args:
        data: The source bytes.
        reason: `ok`, or the class of the failure.
        detail: What happened, for a person.
        attempts: Requests that were sent; 1 for a file.
        http_status: The last answer's status.
        final_url: The last address asked, after redirects.
    """

    data: bytes | None
    reason: str = "ok"
    detail: str = ""
    attempts: int = 1
    http_status: int | None = None
    final_url: str | None = None

    def refused(self, reason: str, detail: str) -> FetchResult:
        """Return the failure that these bytes turned out to be."""
        return replace(self, data=None, reason=reason, detail=detail)

    def without_data(self) -> FetchResult:
        """Return the same without the bytes."""
        return replace(self, data=None)

    def with_data(self, data: bytes | None) -> FetchResult:
        """Return the same with the bytes."""
        return replace(self, data=data)

    def after(self, attempts: int) -> FetchResult:
        """Return the same after more attempts."""
        return replace(self, attempts=attempts)
