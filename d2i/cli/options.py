"""Options that several commands share, and the readers of their values."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from d2i.cli.completion import CORPORA, complete_corpus, complete_recipe
from d2i.cli.help import FETCHING, FORECAST, READING, WORKERS
from d2i.errors import ConfigError

if TYPE_CHECKING:
    from d2i.cluster.estimate import RateOverrides
    from d2i.fetch.sources import NetworkPolicy

CorpusOption = Annotated[
    str,
    typer.Option(
        "--corpus",
        help=f"{', '.join(CORPORA)}, or your own as package.module:Class.",
        autocompletion=complete_corpus,
    ),
]
SourceOption = Annotated[
    str, typer.Option("--source", help="Directory or file of the corpus, a path or URL.")
]
RECIPE_HELP = "A recipe's name ('d2i recipes'), FILE.toml, FILE.json, or package.module:function."
RecipeOption = Annotated[
    str, typer.Option("--recipe", help=RECIPE_HELP, autocompletion=complete_recipe)
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Change a setting, e.g. image.resolution=64."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as one JSON line.")]
RayOption = Annotated[
    str | None,
    typer.Option(
        "--ray-address",
        help="A running Ray cluster; by default Ray starts here.",
        rich_help_panel=WORKERS,
    ),
]
WorkersOption = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="Number of Ray workers; 0: this process, without Ray.",
        rich_help_panel=WORKERS,
    ),
]
FetchWorkersOption = Annotated[
    int | None,
    typer.Option(
        min=1, help="Number of Ray workers that fetch and decode.", rich_help_panel=WORKERS
    ),
]
CacheDirOption = Annotated[
    Path | None,
    typer.Option(
        "--cache-dir", help="Local directory that caches remote shards.", rich_help_panel=READING
    ),
]
CacheGbOption = Annotated[
    float | None,
    typer.Option(
        "--cache-gb",
        min=0,
        help="Maximum size of the cache, in 1e9 bytes; default: unlimited.",
        rich_help_panel=READING,
    ),
]
CheckDataOption = Annotated[
    bool,
    typer.Option(
        "--check-data/--no-check-data",
        help="Verify checksums when data is first read; not needed after d2i verify.",
        rich_help_panel=READING,
    ),
]
FaultOption = Annotated[
    str | None,
    typer.Option(
        "--fault", help="Inject a fault, for tests: POINT:error|sleep|kill:N.", hidden=True
    ),
]
RateOption = Annotated[
    float | None,
    typer.Option(
        "--rate",
        min=1e-9,
        help="With --dry-run: instances/s of one worker; default: as measured.",
        rich_help_panel=FORECAST,
    ),
]
PriceOption = Annotated[
    float | None,
    typer.Option(
        "--price-per-node-hour",
        min=0,
        help="With --dry-run: price of a node per hour.",
        rich_help_panel=FORECAST,
    ),
]
AllowHostOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="HOST:PORT",
        help="Allow requests to this private host (SSRF guard).",
        rich_help_panel=FETCHING,
    ),
]
DnsServerOption = Annotated[
    str | None,
    typer.Option(
        metavar="HOST:PORT",
        help="Resolve hosts through this DNS server.",
        rich_help_panel=FETCHING,
    ),
]
ProxyOption = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        envvar="D2I_PROXY",
        help="Fetch through this proxy: http://[USER:PASSWORD@]HOST:PORT.",
        rich_help_panel=FETCHING,
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
