"""SSRF guard: the URLs and IP addresses that may be requested (docs/threats.md, URLs).

Sends no requests itself.
"""

from __future__ import annotations

import ipaddress
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import SplitResult, quote, urlsplit

import dns.exception
import dns.name

from d2i.errors import ConfigError
from d2i.fetch.result import FetchError

PORTS = {"http": 80, "https": 443}
# Characters of a path or query that stay unquoted; '%' too, as URLs are percent-encoded already.
_PLAIN = "/%:@!$&'()*+,;=~-._?"
_GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")
_DOCUMENTATION = ipaddress.ip_network("3fff::/20")
_DOTS = str.maketrans(dict.fromkeys("\u3002\uff0e\uff61", "."))
_OF_PLATFORMS = tuple(
    map(ipaddress.ip_network, ("168.63.129.16/32", "192.0.0.0/24", "192.88.99.0/24"))
)
"""Networks that Python counts as public, but that belong to each cloud machine: Azure's wire
server, and Oracle's metadata service among the protocols' addresses (RFC 6890); also the former
6to4 relays (RFC 7526)."""


@dataclass(frozen=True)
class Target:
    """Target of one request: checked scheme, host and port, and encoded path with query."""

    scheme: str
    host: str
    port: int
    path: str

    @property
    def netloc(self) -> str:
        """`HOST:PORT`, as in `--allow-host` and as the key of the rate limiter."""
        return _netloc(self.host, self.port)

    @property
    def authority(self) -> str:
        """`HOST:PORT`, or `HOST` alone if the port is the scheme's default, as in a URL."""
        is_usual = self.port == PORTS[self.scheme]
        return self.netloc.rpartition(":")[0] if is_usual else self.netloc


def check_url(url: str, allow_hosts: frozenset[str]) -> Target:
    """Parse and check a URL.

    Raises:
        FetchError: `bad_url` if it is not an http or https URL with a host; `refused_address` if
            its port is not the default of its scheme and not allowed.
    """
    try:
        parts = urlsplit(url)
        port, host = parts.port, _host(parts)
    except ValueError as err:
        raise FetchError("bad_url", str(err)) from err
    if parts.scheme not in PORTS or not host or not host.isprintable() or port == 0:
        raise FetchError("bad_url", "expected an http or https URL with a host")
    target = Target(parts.scheme, host, port or PORTS[parts.scheme], _path(parts))
    if target.port != PORTS[parts.scheme] and target.netloc not in allow_hosts:
        raise FetchError(
            "refused_address", f"port {target.port} is not the default {PORTS[parts.scheme]}"
        )
    return target


def allowed_hosts(named: Iterable[str]) -> frozenset[str]:
    """Parse `--allow-host` values, `HOST:PORT` or `HOST` for the default ports, as `Target.netloc`.

    Raises:
        ConfigError: If a value is neither.
    """
    return frozenset(netloc for text in named for netloc in _named_netlocs(text))


def _named_netlocs(text: str) -> list[str]:
    try:
        parts = urlsplit(f"//{text}")
        host, port = _host(parts), parts.port
    except ValueError:
        host, port = "", None
    if not host or port == 0 or parts.netloc != text or parts.username is not None:
        raise ConfigError(
            f"--allow-host {text}: expected HOST:PORT, such as mirror.local:8080 or [::1]:80"
        )
    return [_netloc(host, one) for one in ([port] if port else PORTS.values())]


def _netloc(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _host(parts: SplitResult) -> str:
    """Return a host in normal form: ASCII, lower case, an IP address as usually written.

    Done once, before every check: full-width digits and the dots of other scripts also spell
    an IP address.

    Raises:
        ValueError: If it is not a host name.
    """
    host = unicodedata.normalize("NFKC", parts.hostname or "").translate(_DOTS).rstrip(".")
    if not host.isascii():
        host = host.encode("idna").decode("ascii").lower()
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        return _name(host)


def _name(host: str) -> str:
    """Return a host name that is valid in DNS: no label empty or over 63 bytes, 255 in all.

    Raises:
        ValueError: If it is not.
    """
    try:
        dns.name.from_text(host)
    except dns.exception.DNSException as err:
        raise ValueError(f"{host[:64]} is not a host name: {err}") from err
    return host


def check_addresses(target: Target, addresses: Iterable[str], allow_hosts: frozenset[str]) -> None:
    """Refuse a host if any of its IP addresses is not on the public internet.

    Raises:
        FetchError: `refused_address`.
    """
    if target.netloc in allow_hosts:
        return
    for address in addresses:
        if not is_public(address):
            raise FetchError(
                "refused_address", f"{target.host} has the non-public IP address {address}"
            )


def is_public(address: str) -> bool:
    """Return whether an IP address is on the public internet; IPv4-in-IPv6 forms are unwrapped.

    6to4 and Teredo addresses are not: both are abandoned, and lead through a tunnel to another.
    """
    ip = ipaddress.ip_address(address.partition("%")[0])
    if any(ip in network for network in _OF_PLATFORMS):
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            return is_public(str(ip.ipv4_mapped))
        if ip.sixtofour or ip.teredo:
            # The relay on the way decides where such a packet ends.
            return False
        if ip in ipaddress.ip_network("64:ff9b::/96"):
            return is_public(str(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)))
        if ip not in _GLOBAL_UNICAST or ip in _DOCUMENTATION:
            return False
    return ip.is_global and not ip.is_multicast


def _path(parts: SplitResult) -> str:
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return quote(path, safe=_PLAIN)
