"""Which hosts most pictures were lost to, read from the ledger when a split is finished."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import urlsplit

from d2i.preprocess.ledger import LedgerRow

_NUM_HOSTS = 5


@dataclass(frozen=True)
class HostFailures:
    """How many instances were lost to one host, by reason."""

    host: str
    failures: dict[str, int]

    @property
    def num(self) -> int:
        """All of them."""
        return sum(self.failures.values())


def hosts_of_failure(rows: Iterable[LedgerRow]) -> list[HostFailures]:
    """Return the hosts to which most instances were lost, the worst first."""
    by_host: dict[str, Counter[str]] = {}
    for row in rows:
        if row.status != "ok" and (host := _host(row.final_url)):
            by_host.setdefault(host, Counter())[row.reason] += 1
    hosts = [HostFailures(host, dict(sorted(c.items()))) for host, c in by_host.items()]
    return sorted(hosts, key=lambda h: (-h.num, h.host))[:_NUM_HOSTS]


def _host(url: str | None) -> str | None:
    try:
        return urlsplit(url or "").hostname
    except ValueError:
        return None
