"""Options that several commands share, and the readers of their values."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from d2i.errors import ConfigError

if TYPE_CHECKING:
    from d2i.cluster.estimate import RateOverrides
    from d2i.fetch.sources import NetworkPolicy

CorpusOption = Annotated[
    str,
    typer.Option(
        "--corpus", help="mmdialog, photochat, jsonl, or your own as package.module:Class."
    ),
]
SourceOption = Annotated[
    str, typer.Option("--source", help="Directory or file of the corpus, a path or URL.")
]
RECIPE_HELP = "A recipe's name ('d2i recipes'), FILE.toml, FILE.json, or package.module:function."
RecipeOption = Annotated[str, typer.Option("--recipe", help=RECIPE_HELP)]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Change a setting, e.g. image.resolution=64."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as one JSON line.")]
RayOption = Annotated[
    str | None,
    typer.Option("--ray-address", help="A running Ray cluster; by default Ray starts here."),
]
WorkersOption = Annotated[
    int | None, typer.Option(min=0, help="Number of Ray workers; 0: this process, without Ray.")
]
FetchWorkersOption = Annotated[
    int | None, typer.Option(min=1, help="Number of Ray workers that fetch and decode.")
]
CacheDirOption = Annotated[
    Path | None, typer.Option("--cache-dir", help="Local directory that caches remote shards.")
]
CacheGbOption = Annotated[
    float | None,
    typer.Option(
        "--cache-gb", min=0, help="Maximum size of the cache, in 1e9 bytes; default: unlimited."
    ),
]
CheckDataOption = Annotated[
    bool,
    typer.Option(
        "--check-data/--no-check-data",
        help="Verify checksums when data is first read; not needed after d2i verify.",
    ),
]
FaultOption = Annotated[
    str | None, typer.Option("--fault", help="Inject a fault, for tests: POINT:error|sleep|kill:N.")
]
RateOption = Annotated[
    float | None,
    typer.Option(
        "--rate", min=1e-9, help="With --dry-run: instances/s of one worker; default: as measured."
    ),
]
PriceOption = Annotated[
    float | None,
    typer.Option("--price-per-node-hour", min=0, help="With --dry-run: price of a node per hour."),
]
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


def existing_source(source: str) -> str:
    """Return the URL of a corpus.

    Raises:
        ConfigError: If nothing is there.
    """
    from d2i.io import storage

    if not storage.exists(source):
        raise ConfigError(
            f"--source {source}: no such file or directory; expected a corpus; check the path"
        )
    return source


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


def assumed_of(rate: float | None, price: float | None, *, dry_run: bool) -> RateOverrides:
    """Read both options.

    Raises:
        ConfigError: If one is given without a dry run.
    """
    from d2i.cluster.estimate import RateOverrides

    given = {"--rate": rate, "--price-per-node-hour": price}
    if not dry_run and (named := [name for name, value in given.items() if value is not None]):
        raise ConfigError(
            f"{named[0]} applies only to a dry run; expected --dry-run with it; add --dry-run"
        )
    return RateOverrides(rate, price)
