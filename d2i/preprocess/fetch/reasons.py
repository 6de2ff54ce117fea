"""Why a picture could not be had: the reason classes of the ledger, permanent and passing."""

from __future__ import annotations

_PASSING_STATUS = {408, 425, 429}
_PASSING = frozenset(
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
`RefusedRequestError.was_reached`."""


class RefusedRequestError(Exception):
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


def is_passing(reason: str) -> bool:
    """Say whether asking again later may help: not for what is gone, refused or broken."""
    kind, _, status = reason.partition("http_")
    if not kind and status.isdigit():
        return int(status) in _PASSING_STATUS or int(status) >= 500
    return reason in _PASSING
