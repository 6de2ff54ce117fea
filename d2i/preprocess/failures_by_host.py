"""Hosts with the most failed images, read from the ledger when a split is finished."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from urllib.parse import urlsplit

import pyarrow.compute as pc

from d2i.preprocess.ledger import ledger_tables

_NUM_HOSTS = 5


@dataclass(frozen=True)
class HostFailures:
    """Failed instances of one host, counted by reason."""

    host: str
    failures: dict[str, int]

    @property
    def num(self) -> int:
        """Number of all failed instances."""
        return sum(self.failures.values())


def hosts_of_failure(split_url: str) -> list[HostFailures]:
    """Return the hosts with the most failed instances of a split, worst first."""
    by_host: dict[str, Counter[str]] = {}
    for _, table in ledger_tables(split_url, ["status", "final_url", "reason"]):
        failed = table.filter(pc.not_equal(table["status"], "ok"))
        urls, reasons = failed["final_url"].to_pylist(), failed["reason"].to_pylist()
        for url, reason in zip(urls, reasons, strict=True):
            if host := _host(url):
                by_host.setdefault(host, Counter())[reason] += 1
    hosts = [HostFailures(host, dict(sorted(c.items()))) for host, c in by_host.items()]
    return sorted(hosts, key=lambda h: (-h.num, h.host))[:_NUM_HOSTS]


def _host(url: str | None) -> str | None:
    try:
        return urlsplit(url or "").hostname
    except ValueError:
        return None
