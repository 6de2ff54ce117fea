"""The proxy that requests go through: it finds hosts itself, and may refuse them (Smokescreen)."""

from __future__ import annotations

import base64
import http.client
import socket
from contextlib import closing
from dataclasses import dataclass, field
from urllib.parse import SplitResult, unquote, urlsplit

from d2i.errors import ConfigError
from d2i.preprocess.fetch.reasons import RefusedRequestError
from d2i.preprocess.fetch.ssrf_guard import Target

_DENIED_HEADERS = ("X-Smokescreen-Error", "X-Squid-Error")
"""What proxies add to an answer of their own, so that it is not taken for the host's."""
_NEEDS_PROXY_LOGIN = 407  # Smokescreen says so for what its rules forbid, too.
_FORBIDDEN = 403
_PASSING_STATUS = 500


@dataclass(frozen=True)
class Proxy:
    """A proxy's place, and what it is told to let us pass; that is never shown."""

    host: str
    port: int
    authorization: str | None = field(default=None, repr=False)

    def headers(self) -> dict[str, str]:
        """Return what only the proxy is told."""
        return {"Proxy-Authorization": self.authorization} if self.authorization else {}

    def address_line(self, target: Target) -> str:
        """Return how a proxy is asked for a plain http target."""
        return f"{target.scheme}://{target.authority}{target.path}"

    def tunnel(self, connection: socket.socket, target: Target) -> None:
        """Make the proxy connect to a target and pass bytes on from here on.

        Raises:
            RefusedRequestError: `proxy_refused`, or `connect` where it did not reach the target.
            OSError, http.client.HTTPException: What the connection raised.
        """
        netloc = target.netloc.encode("idna").decode("ascii")
        lines = [f"CONNECT {netloc} HTTP/1.1", f"Host: {netloc}"]
        lines += [f"{name}: {value}" for name, value in self.headers().items()]
        connection.sendall("\r\n".join([*lines, "", ""]).encode("ascii"))
        with closing(http.client.HTTPResponse(connection, method="CONNECT")) as answer:
            answer.begin()
            said = f"the proxy answered {answer.status} {answer.reason}"
            if answer.status >= _PASSING_STATUS:
                raise RefusedRequestError("connect", said)
            if answer.status != http.client.OK:
                raise RefusedRequestError("proxy_refused", said)

    def check_answer(self, answer: http.client.HTTPResponse) -> None:
        """Tell the proxy's own refusal of a plain http target from what the target answered.

        Raises:
            RefusedRequestError: `proxy_refused`.
        """
        is_its_own = any(name in answer.headers for name in _DENIED_HEADERS)
        if answer.status == _NEEDS_PROXY_LOGIN or (answer.status == _FORBIDDEN and is_its_own):
            raise RefusedRequestError(
                "proxy_refused", f"the proxy answered {answer.status} {answer.reason}"
            )


def parse_proxy(text: str) -> Proxy:
    """Read `http://[USER:PASSWORD@]HOST:PORT`.

    Raises:
        ConfigError: If it is none; the message shows neither user nor password.
    """
    try:
        parts = urlsplit(text)
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if not host or not port or parts.scheme != "http" or parts.path.strip("/"):
        shown = text.rpartition("@")[2]
        raise ConfigError(
            f"--proxy {shown}: expected http://HOST:PORT, or http://USER:PASSWORD@HOST:PORT; "
            "a proxy that is itself reached by https cannot be used"
        )
    return Proxy(host, port, _authorization(parts))


def _authorization(parts: SplitResult) -> str | None:
    if parts.username is None:
        return None
    login = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    return "Basic " + base64.b64encode(login.encode()).decode("ascii")
