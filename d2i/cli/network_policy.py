"""Options of the network policy: allowed private hosts, the DNS server and the proxy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from d2i.errors import ConfigError

if TYPE_CHECKING:
    from d2i.fetch.sources import NetworkPolicy

AllowHostOption = Annotated[
    list[str] | None,
    typer.Option(metavar="HOST:PORT", help="Allow requests to this private host (SSRF guard)."),
]
DnsServerOption = Annotated[
    str | None, typer.Option(metavar="HOST:PORT", help="Resolve hosts through this DNS server.")
]
ProxyOption = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        envvar="D2I_PROXY",
        help="Fetch through this proxy: http://[USER:PASSWORD@]HOST:PORT.",
    ),
]


def network_policy_of(
    allow_host: list[str] | None, dns_server: str | None, proxy: str | None
) -> NetworkPolicy:
    """Read the three options.

    Raises:
        ConfigError: If one cannot be read, or two of them exclude each other.
    """
    from d2i.fetch.sources import NetworkPolicy
    from d2i.fetch.ssrf_guard import allowed_hosts
    from d2i.fetch.transport import parse_proxy

    if proxy and dns_server:
        raise ConfigError(
            f"--dns-server {dns_server}: got --proxy as well, which resolves hosts itself; "
            "expected one of the two; leave one out"
        )
    hosts = allowed_hosts(allow_host or [])
    return NetworkPolicy(hosts, dns_server, parse_proxy(proxy) if proxy else None)
