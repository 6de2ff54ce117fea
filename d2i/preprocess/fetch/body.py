"""The body of an answer: never longer than its limit, never slower than its rate."""

from __future__ import annotations

import http.client
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass

from d2i.preprocess.fetch.reasons import RefusedRequestError

_CHUNK_BYTES = 1 << 16
_GRACE_S = 5.0
"""How long a connection may be slower than the minimum rate, in seconds (ours)."""
_GZIP_OR_ZLIB = 32 + zlib.MAX_WBITS
_GZIP = b"\x1f\x8b"
_NUM_MEMBERS = 100
"""Gzip members that a body may be made of; thousands of empty ones are an attack (ours)."""


@dataclass(frozen=True)
class BodyLimits:
    """What a body may be.

    Args:
        max_bytes: Its length, also after decompression.
        min_rate_bytes_s: Bodies that come more slowly, after a few seconds, are given up.
    """

    max_bytes: int
    min_rate_bytes_s: float


def read_body(
    answer: http.client.HTTPResponse, limits: BodyLimits, before_each: Callable[[], None]
) -> bytes:
    """Read a body to its end, and unpack it.

    Args:
        answer: Its head was read.
        limits: What it may be.
        before_each: Called before each receive; it may raise.

    Raises:
        RefusedRequestError: `too_many_bytes`, `too_slow`, `encoded_body` or `cut_body`.
        OSError, http.client.HTTPException: What the connection raised.
    """
    body = _Body(limits.max_bytes, answer.getheader("Content-Encoding", "identity"))
    started, num_received = time.monotonic(), 0
    while True:
        before_each()
        chunk = answer.read1(_CHUNK_BYTES)
        if not chunk:
            break
        num_received += len(chunk)
        if num_received > limits.max_bytes:
            raise RefusedRequestError("too_many_bytes", f"over {limits.max_bytes} bytes")
        elapsed_s = time.monotonic() - started
        if elapsed_s > _GRACE_S and num_received < limits.min_rate_bytes_s * elapsed_s:
            raise RefusedRequestError("too_slow", f"{num_received} bytes in {elapsed_s:.0f} s")
        body.add(chunk)
    # A connection that was ended at its deadline looks as if the body had ended.
    before_each()
    if answer.length:
        raise RefusedRequestError("cut_body", f"the body ended {answer.length} bytes early")
    return body.whole()


class _Body:
    """A body under way, decompressed as it comes, never longer than the limit."""

    def __init__(self, max_bytes: int, encoding: str) -> None:
        name = encoding.strip().lower()
        if name not in ("identity", "", "gzip", "x-gzip", "deflate"):
            raise RefusedRequestError("encoded_body", f"got encoding {encoding!r}, asked for none")
        self._max_bytes = max_bytes
        self._is_packed = name not in ("identity", "")
        self._inflate = zlib.decompressobj(_GZIP_OR_ZLIB)
        self._num_members = 1
        self._after_member = b""
        self._data = bytearray()

    def add(self, chunk: bytes) -> None:
        """Append what was received."""
        if self._is_packed:
            self._add_packed(chunk)
        else:
            self._append(chunk)

    def whole(self) -> bytes:
        """Return the body, which must be complete."""
        if self._is_packed and not self._inflate.eof:
            raise RefusedRequestError("cut_body", "the compressed body ended early")
        return bytes(self._data)

    def _add_packed(self, chunk: bytes) -> None:
        try:
            while chunk:
                if self._inflate.eof and not (chunk := self._next_member(chunk)):
                    return
                # One byte more than there is room for shows that there is more.
                room = self._max_bytes - len(self._data) + 1
                self._append(self._inflate.decompress(chunk, room))
                chunk = self._inflate.unused_data
        except zlib.error as err:
            raise RefusedRequestError("encoded_body", str(err)) from err

    def _next_member(self, chunk: bytes) -> bytes:
        """Begin the gzip member that follows a finished one; what is none is passed over."""
        begun = (self._after_member + chunk)[: len(_GZIP)]
        if begun != _GZIP:
            # One byte does not show yet what follows.
            self._after_member = begun if len(begun) < len(_GZIP) else b"\0"
            return b""
        self._num_members += 1
        if self._num_members > _NUM_MEMBERS:
            raise RefusedRequestError("encoded_body", f"over {_NUM_MEMBERS} gzip members")
        whole, self._after_member = self._after_member + chunk, b""
        self._inflate = zlib.decompressobj(_GZIP_OR_ZLIB)
        return whole

    def _append(self, data: bytes) -> None:
        self._data += data
        if len(self._data) > self._max_bytes:
            raise RefusedRequestError("too_many_bytes", f"over {self._max_bytes} bytes")
