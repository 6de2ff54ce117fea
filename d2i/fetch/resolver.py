"""DNS resolver with a deadline and a cache; the system's resolver has neither."""

from __future__ import annotations

import ipaddress
import socket
import threading
import time

import dns.exception
import dns.name
import dns.resolver

from d2i.errors import ConfigError
from d2i.fetch.result import FetchError

_NUM_REMEMBERED = 100_000
_REMEMBERED_FAILURE_S = 60.0
"""Time for which a failed lookup is cached, in seconds (our default)."""
_DNS_PORT = 53


class Resolver:
    """Resolves host names by DNS; answers are cached for their TTL, failures for a minute.

    Thread-safe.

    Args:
        server: `HOST:PORT` or `HOST` of a DNS server, an IP address; None takes the system's.

    Raises:
        ConfigError: If the server is not an IP address, or the system names none.
    """

    def __init__(self, server: str | None = None) -> None:
        self._resolver = _build(server)
        self._resolver.cache = dns.resolver.LRUCache(_NUM_REMEMBERED)
        self._failures: dict[str, tuple[float, FetchError]] = {}
        self._lock = threading.Lock()

    def addresses(self, host: str, timeout_s: float) -> list[str]:
        """Return the IP addresses of a host: IPv4 if it has any, else IPv6.

        Args:
            host: A name, or an IP address in any notation that a browser accepts.
            timeout_s: How long the lookup may take.

        Raises:
            FetchError: `no_such_host`, or `dns_failed` if no answer came.
        """
        if (literal := literal_address(host)) is not None:
            return [literal]
        self._refuse_remembered(host)
        try:
            return self._query(host, timeout_s)
        except FetchError as err:
            self._remember(host, err)
            raise

    def _query(self, host: str, timeout_s: float) -> list[str]:
        deadline = time.monotonic() + timeout_s
        try:
            name = dns.name.from_text(host)
            for kind in ("A", "AAAA"):
                left_s = max(deadline - time.monotonic(), 0.01)
                answer = self._resolver.resolve(
                    name, kind, raise_on_no_answer=False, lifetime=left_s, search=False
                )
                if answer.rrset:
                    return [str(record) for record in answer.rrset]
        except dns.resolver.NXDOMAIN as err:
            raise FetchError("no_such_host", f"{host}: {err}") from err
        except (dns.exception.DNSException, OSError, UnicodeError) as err:
            raise FetchError("dns_failed", f"{host}: {err}") from err
        raise FetchError("no_such_host", f"{host} has no IP address")

    def _refuse_remembered(self, host: str) -> None:
        with self._lock:
            until, error = self._failures.get(host, (0.0, None))
        if error is not None and time.monotonic() < until:
            raise FetchError(error.reason, str(error))

    def _remember(self, host: str, error: FetchError) -> None:
        with self._lock:
            if len(self._failures) >= _NUM_REMEMBERED:
                self._failures.clear()
            self._failures[host] = (time.monotonic() + _REMEMBERED_FAILURE_S, error)


def _build(server: str | None) -> dns.resolver.Resolver:
    if server is None:
        try:
            return dns.resolver.Resolver()
        except dns.exception.DNSException as err:
            raise ConfigError(
                f"no DNS server is configured on this machine ({err}); give one with --dns-server"
            ) from err
    host, _, port = server.rpartition(":") if server.count(":") == 1 else (server, "", "")
    resolver = dns.resolver.Resolver(configure=False)
    try:
        resolver.nameservers = [str(ipaddress.ip_address(host))]
        resolver.port = int(port) if port else _DNS_PORT
    except ValueError as err:
        raise ConfigError(f"--dns-server {server}: expected an IP address, or IP:PORT") from err
    return resolver


def literal_address(host: str) -> str | None:
    """Return the IP address of a host that is written as one (127.1, 0x7f000001, ...), or None."""
    try:
        return str(ipaddress.ip_address(host.partition("%")[0]))
    except ValueError:
        pass
    if not host[:1].isdigit():
        return None
    try:
        return socket.inet_ntoa(socket.inet_aton(host))
    except OSError:
        return None
