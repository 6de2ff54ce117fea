"""What came of one picture: its bytes, or why there are none."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Fetched:
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

    def refused(self, reason: str, detail: str) -> Fetched:
        """Return the failure that these bytes turned out to be."""
        return replace(self, data=None, reason=reason, detail=detail)

    def without_data(self) -> Fetched:
        """Return the same without the bytes."""
        return replace(self, data=None)

    def with_data(self, data: bytes | None) -> Fetched:
        """Return the same with the bytes."""
        return replace(self, data=data)

    def after(self, attempts: int) -> Fetched:
        """Return the same after more attempts."""
        return replace(self, attempts=attempts)
