"""Image files of a directory: each is read once, in order, with bounded prefetch."""

from __future__ import annotations

from pathlib import Path

import pytest

from d2i.cluster import Session
from d2i.config import FetchConfig
from d2i.dialog import ImageRef
from d2i.errors import ConfigError
from d2i.fetch import sources
from d2i.fetch.rate_limiter import create_shared_limiter
from d2i.fetch.result import FetchResult
from d2i.fetch.sources import (
    PUBLIC_NETWORK,
    ImageSource,
    NetworkPolicy,
    build_rate_limiter,
)
from d2i.images import image_files
from tests.servers import Names, WebServer, name_server, running

NUM_FILES = 203


def source_of(directory: Path, num_threads: int) -> ImageSource:
    config = FetchConfig(num_threads=num_threads)
    limiter = create_shared_limiter(build_rate_limiter(config), Session(0))
    return ImageSource(str(directory), config, PUBLIC_NETWORK, limiter)


def refs_of(directory: Path) -> list[ImageRef]:
    for number in range(NUM_FILES):
        if number % 7:
            (directory / f"{number:03}").write_text(str(number))
    return [ImageRef("file", (f"{number:03}",)) for number in range(NUM_FILES)]


def fetch_from_mirror(
    template: str, network_policy: NetworkPolicy, *paths: str
) -> tuple[list[str], str | None]:
    """Return the reason of each file requested from a mirror, and the reason of an outage."""
    config = FetchConfig(mirror=template, num_threads=2)
    limiter = create_shared_limiter(build_rate_limiter(config, network_policy), Session(0))
    source = ImageSource("/nowhere", config, network_policy, limiter)
    refs = [ImageRef("file", (path,)) for path in paths]
    found = dict(source.fetch(refs, lambda ref, fetched: (ref, fetched.reason)))
    return [found[ref] for ref in refs], source.outage_reason()


def test_mirror_requests_stay_below_template_path() -> None:
    answers = dict.fromkeys(("/p/train/1.jpg", "/p/a%2520b"), lambda h: h.send(200, b"GIF89a"))
    with running(WebServer("127.0.0.1", answers)) as web:
        host = f"127.0.0.1:{web.port}"
        network_policy = NetworkPolicy(frozenset([host]))
        paths = ("train/1.jpg", "a%20b", "gone.jpg", "../secret", "a/../../secret")
        found = fetch_from_mirror(f"http://{host}/p/{{path}}", network_policy, *paths)
        by_key = fetch_from_mirror(f"http://{host}/p/{{key}}/x", network_policy, "...jpg")
    assert found == (["ok", "ok", "http_404", "bad_url", "bad_url"], None)
    assert by_key == (["bad_url"], None)
    assert set(web.asked) == {*answers, "/p/gone.jpg"}


def test_missing_mirror_is_outage_not_many_failures() -> None:
    with running(name_server(Names({}))) as dns:
        network_policy = NetworkPolicy(dns_server=f"127.0.0.1:{dns.server_address[1]}")
        _, outage = fetch_from_mirror(
            "http://misspelt.test/{path}", network_policy, "1.jpg", "2.jpg"
        )
    assert "the mirror misspelt.test:80 could not be reached" in str(outage)


def test_mirror_on_disallowed_port_raises_at_once() -> None:
    config = FetchConfig(mirror="http://mirror.test:8080/{path}")
    with pytest.raises(ConfigError, match=r"port 8080 is not the default 80.*--allow-host"):
        build_rate_limiter(config)
    allowed = NetworkPolicy(frozenset(["mirror.test:8080"]))
    assert build_rate_limiter(config, allowed).mirror == "mirror.test:8080"
    assert build_rate_limiter(FetchConfig(mirror="http://{key}.test/x")).mirror is None


@pytest.mark.parametrize("num_threads", [1, 3, 16])
def test_files_come_once_and_in_order_even_when_missing(tmp_path: Path, num_threads: int) -> None:
    def path_and_text(ref: ImageRef, fetched: FetchResult) -> tuple[str, str]:
        return ref.value[0], fetched.data.decode() if fetched.data else fetched.reason

    found = list(source_of(tmp_path, num_threads).fetch(refs_of(tmp_path), path_and_text))
    assert found == [
        (f"{number:03}", str(number) if number % 7 else "missing_file")
        for number in range(NUM_FILES)
    ]


def test_prefetch_of_image_files_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    taken: list[ImageRef] = []
    ahead: list[int] = []

    def counted(root: str, path: str, max_bytes: int) -> bytes:
        read.append(path)
        ahead.append(len(read) - len(taken))
        return image_files.read_image(root, path, max_bytes)

    monkeypatch.setattr(sources, "read_image", counted)
    for ref in source_of(tmp_path, 3).fetch(refs_of(tmp_path), lambda ref, _: ref):
        taken.append(ref)  # noqa: PERF402  # `counted` reads its length meanwhile.
    assert len(read) == NUM_FILES
    # The runs of three threads, and the one being consumed.
    assert max(ahead) <= 4 * sources._RUN
