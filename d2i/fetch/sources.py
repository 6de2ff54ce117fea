"""Source of images: files of a directory or of tars, URLs and downloads, behind one call.

Files that a corpus lists by name may also come from a mirror: one host that has them all. URLs are
requested in an order that spreads each host's evenly over the whole.
"""

from __future__ import annotations

import itertools
import re
import threading
import zlib
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import PurePosixPath
from typing import TypeVar
from urllib.parse import quote, urlsplit

from d2i import __version__
from d2i.cluster import Session
from d2i.config import FetchConfig
from d2i.dialog import ImageRef
from d2i.errors import ConfigError
from d2i.fetch.downloader import Downloader, RetryPolicy
from d2i.fetch.downloads import Download, open_downloads, read_download
from d2i.fetch.http_client import BodyLimits, Limits
from d2i.fetch.img2dataset_pool import fetch_all
from d2i.fetch.known_placeholders import KnownPlaceholders
from d2i.fetch.rate_limiter import (
    HostLimits,
    RateLimiter,
    ShardedRateLimiter,
    create_shared_limiter,
)
from d2i.fetch.resolver import Resolver
from d2i.fetch.result import FetchError, FetchResult
from d2i.fetch.ssrf_guard import check_url
from d2i.fetch.transport import DirectTransport, Proxy, ProxyTransport, Transport
from d2i.images.decode import ImageRejectedError
from d2i.images.image_files import read_image

OpenedT = TypeVar("OpenedT")
_NUM_WAITING = 16
"""Threads beyond the connection slots, so that a host in backoff does not block others (our
default)."""
_RUN = 4
"""Files that a thread reads per task: handing a result over costs as much as reading a file."""
_PLACEHOLDER = re.compile(r"\{(path|name|key)\}")


@dataclass(frozen=True)
class NetworkPolicy:
    """Network settings of the command line: private hosts that may be requested, DNS server, proxy.

    Args:
        allow_hosts: Private hosts that may be requested, as `ssrf_guard.allowed_hosts` returns
            them.
        dns_server: `HOST:PORT` of the DNS server; None takes the system's.
        proxy: Proxy for all requests; it resolves the hosts.
    """

    allow_hosts: frozenset[str] = frozenset()
    dns_server: str | None = None
    proxy: Proxy | None = None


PUBLIC_NETWORK = NetworkPolicy()
"""Public hosts only, the system's DNS, no proxy."""


@dataclass(frozen=True)
class ImageSource:
    """Source of a job's images, with its limits.

    Args:
        image_root: Directory (any fsspec URL) that `file` references are relative to, or tars
            (`d2i.images.image_files`).
        config: The limits.
        network_policy: Private hosts that may be requested, the DNS server, the proxy.
        hosts: Rate limiter that all workers share.
    """

    image_root: str
    config: FetchConfig
    network_policy: NetworkPolicy
    hosts: ShardedRateLimiter

    def fetch(
        self,
        refs: Collection[ImageRef],
        open_image: Callable[[ImageRef, FetchResult], OpenedT],
        read_inline: Callable[[ImageRef, int], FetchResult] | None = None,
    ) -> Iterator[OpenedT]:
        """Fetch images, and yield each, opened, as it arrives; a failure is a value, never raised.

        Args:
            refs: The images, without duplicates.
            open_image: Converts a fetched result into what is yielded; called by one thread at a
                time.
            read_inline: Reads an `inline` image of at most so many bytes; needed only if there is
                one.
        """
        ordered = sorted(refs, key=lambda ref: ref.value)
        files: list[ImageRef] = []
        by_url: list[ImageRef] = []
        downloaded: dict[ImageRef, tuple[Download, str]] = {}
        for ref in ordered:
            is_file = ref.kind == "file" and self.config.mirror is None
            if is_file or ref.kind == "inline":
                files.append(ref)
            elif found := self._find_download(ref):
                downloaded[ref] = found
                files.append(ref)
            else:
                by_url.append(ref)

        def read(ref: ImageRef) -> FetchResult:
            if ref in downloaded:
                return self._read_download(*downloaded[ref])
            if ref.kind == "file" or read_inline is None:
                return self._read_file(ref)
            return read_inline(ref, self._max_bytes())

        yield from self._read_files(files, open_image, read)
        yield from self._download_all(by_url, open_image)

    def outage_reason(self, *, of_names: bool = False) -> str | None:
        """Return why this machine's own network seems to be down, or None."""
        return self.hosts.outage_reason(of_names=of_names)

    def _read_files(
        self,
        refs: list[ImageRef],
        open_image: Callable[[ImageRef, FetchResult], OpenedT],
        read: Callable[[ImageRef], FetchResult],
    ) -> Iterator[OpenedT]:
        runs = (refs[start : start + _RUN] for start in range(0, len(refs), _RUN))
        with ThreadPoolExecutor(self.config.num_threads) as threads:
            begun: deque[tuple[list[ImageRef], Future[list[FetchResult]]]] = deque()

            def begin(num_runs: int) -> None:
                for run in itertools.islice(runs, num_runs):
                    begun.append((run, threads.submit(_read_run, run, read)))

            begin(self.config.num_threads)
            while begun:
                run, found = begun.popleft()
                for ref, fetched in zip(run, found.result(), strict=True):
                    yield open_image(ref, fetched)
                begin(1)

    def _read_file(self, ref: ImageRef) -> FetchResult:
        path = ref.value[0]
        try:
            data = read_image(self.image_root, path, self._max_bytes())
        except ImageRejectedError as err:
            if err.reason == "missing_file" and self.config.downloads is not None:
                return self._read_key(path)
            return FetchResult(None, err.reason, f"{path}: {err}")
        if why := self._placeholders().why(data):
            return FetchResult(None, "placeholder", f"{path}: {why}")
        return FetchResult(data)

    def _find_download(self, ref: ImageRef) -> tuple[Download, str] | None:
        """Return the first download by any URL of an image, with that URL, or None."""
        if self.config.downloads is None:
            return None
        index = open_downloads(self.config.downloads)
        try:
            urls = self._addresses(ref)
        except FetchError:
            return None
        found = ((index.find_url(url), url) for url in urls)
        return next(((download, url) for download, url in found if download), None)

    def _read_key(self, path: str) -> FetchResult:
        """Read the download whose key is a file's name, if the file itself is missing."""
        found = open_downloads(str(self.config.downloads)).find_key(PurePosixPath(path).stem)
        if not found:
            return FetchResult(
                None, "missing_file", f"{path}: no such file, and no download with that key"
            )
        if len(found) > 1:
            detail = f"{path}: {len(found)} downloads have this key; give one directory of them"
            return FetchResult(None, "ambiguous_file", detail)
        return self._read_download(found[0])

    def _read_download(self, found: Download, url: str | None = None) -> FetchResult:
        return read_download(found, self._max_bytes(), self._placeholders(), url)

    def _download_all(
        self, refs: list[ImageRef], open_image: Callable[[ImageRef, FetchResult], OpenedT]
    ) -> Iterator[OpenedT]:
        fetcher = self._downloader()
        return fetch_all(
            interleave_by_host(refs),
            lambda ref, deadline: self._download(ref, fetcher, deadline),
            open_image,
            num_threads=self.config.num_threads + _NUM_WAITING,
            timeout_s=self.config.shard_timeout_s,
        )

    def _download(self, ref: ImageRef, fetcher: Downloader, deadline: float) -> FetchResult:
        """Fetch an image by its URLs."""
        try:
            addresses = self._addresses(ref)
        except FetchError as err:
            return FetchResult(None, err.reason, str(err), attempts=0)
        return fetcher.fetch(addresses, deadline)

    def _addresses(self, ref: ImageRef) -> Sequence[str]:
        """Return the URLs of an image: for a file, its URL on the mirror."""
        if ref.kind == "urls":
            return ref.value
        return [mirror_url(str(self.config.mirror), ref.value[0])]

    def _downloader(self) -> Downloader:
        config = self.config
        limits = Limits(
            timeout_s=config.timeout_s,
            connect_timeout_s=config.connect_timeout_s,
            body=BodyLimits(self._max_bytes(), config.min_rate_kib_s * 2**10),
            user_agent=user_agent(config.contact),
            allow_hosts=self.network_policy.allow_hosts,
        )
        retry_policy = RetryPolicy(config.num_attempts, config.max_retry_after_s)
        return Downloader(
            limits,
            retry_policy,
            self._route(),
            self.hosts,
            self._placeholders(),
            threading.Semaphore(config.num_threads),
        )

    def _placeholders(self) -> KnownPlaceholders:
        return KnownPlaceholders(frozenset(self.config.placeholder_sha256))

    def _route(self) -> Transport:
        if self.network_policy.proxy is not None:
            return ProxyTransport(self.network_policy.proxy)
        return DirectTransport(_resolver(self.network_policy.dns_server))

    def _max_bytes(self) -> int:
        return self.config.max_image_bytes


def _read_run(refs: list[ImageRef], read: Callable[[ImageRef], FetchResult]) -> list[FetchResult]:
    return [read(ref) for ref in refs]


@cache
def _resolver(server: str | None) -> Resolver:
    """Return the one resolver of this process, so that its cache serves all shards."""
    return Resolver(server)


def build_rate_limiter(
    config: FetchConfig, network_policy: NetworkPolicy = PUBLIC_NETWORK
) -> RateLimiter:
    """Return the rate limiter of a new job.

    Raises:
        ConfigError: If the mirror may not be requested.
    """
    limits = HostLimits(
        config.max_host_requests_per_s,
        config.num_host_failures,
        config.dead_host_s,
        config.max_retry_after_s,
        config.num_trouble_hosts,
    )
    return RateLimiter(
        limits, config.mirror and mirror_host(config.mirror, network_policy.allow_hosts)
    )


def shared_source(
    image_root: str, config: FetchConfig, network_policy: NetworkPolicy, session: Session
) -> ImageSource:
    """Return the source of a job's images, whose rate limits all workers of a session share.

    Raises:
        ConfigError: If the mirror may not be requested.
    """
    limiter = create_shared_limiter(build_rate_limiter(config, network_policy), session)
    return ImageSource(image_root, config, network_policy, limiter)


def user_agent(contact: str | None) -> str:
    """Return the User-Agent header: d2i's name, and a contact for site owners."""
    return f"d2i/{__version__} (dialog-to-image research; {contact or 'no contact given'})"


def interleave_by_host(refs: Iterable[ImageRef]) -> list[ImageRef]:
    """Order images so that neighbours are of different hosts, if there are several.

    Sorted by URL, all requests to a dead host would be in flight before the first one shows that it
    is dead, and the rate limit of one host would hold up the others. The order is a function of the
    set of images.
    """
    by_host: dict[str, list[ImageRef]] = defaultdict(list)
    for ref in sorted(refs, key=lambda ref: ref.value):
        by_host[_host(ref)].append(ref)
    placed: list[tuple[float, str, ImageRef]] = []
    for host, its in by_host.items():
        # Each host starts at its own offset; otherwise all their first URLs would come together.
        begin = zlib.crc32(host.encode()) / 2**32
        placed += [((number + begin) / len(its), host, ref) for number, ref in enumerate(its)]
    return [ref for _, _, ref in sorted(placed, key=lambda place: place[:2])]


def _host(ref: ImageRef) -> str:
    """Return the host part of an image's first URL, valid or not."""
    parts = ref.value[0].split("/", 3) if ref.value else []
    return parts[2].lower() if len(parts) > 2 else ""


def mirror_url(template: str, path: str) -> str:
    """Return the URL of a file on the mirror.

    Args:
        template: `FetchConfig.mirror`.
        path: The file's name in the corpus.

    Raises:
        FetchError: `bad_url` for a name that leaves its directory (path traversal).
    """
    names = {"path": path, "name": path.rpartition("/")[2]}
    names["key"] = names["name"].rpartition(".")[0] or names["name"]
    # A file called `...jpg` has the key `..`.
    if ".." in [*path.split("/"), names["key"]]:
        raise FetchError("bad_url", f"{path}: got a part '..', expected a path below the mirror")
    return _PLACEHOLDER.sub(lambda found: quote(names[found[1]]), template)


def mirror_host(template: str, allow_hosts: frozenset[str]) -> str | None:
    """Return the one host of a mirror, as `Target.netloc`; None if the host depends on the file.

    Raises:
        ConfigError: If the template gives no URL that may be requested.
    """
    try:
        target = check_url(_PLACEHOLDER.sub("x", template), allow_hosts)
    except FetchError as err:
        raise ConfigError(
            f"fetch.mirror {template}: {err}; expected an http or https URL on its default "
            "port; fix it, or allow its host with --allow-host HOST:PORT"
        ) from err
    return None if _PLACEHOLDER.search(urlsplit(template).netloc) else target.netloc
