"""Files of a folder: each is read once, in order, and never far ahead of who takes them."""

from __future__ import annotations

from pathlib import Path

import pytest

from d2i import image_files
from d2i.config import FetchConfig
from d2i.dialog import ImageRef
from d2i.errors import ConfigError
from d2i.preprocess.fetch import sources
from d2i.preprocess.fetch.rate_limiter import create_shared_limiter
from d2i.preprocess.fetch.result import FetchResult
from d2i.preprocess.fetch.sources import (
    PUBLIC_NETWORK,
    ImageSource,
    NetworkPolicy,
    build_rate_limiter,
)
from tests.servers import Names, WebServer, name_server, running

NUM_FILES = 203


def source_of(folder: Path, num_threads: int) -> ImageSource:
    config = FetchConfig(num_threads=num_threads)
    book = create_shared_limiter(build_rate_limiter(config), num_workers=0)
    return ImageSource(str(folder), config, PUBLIC_NETWORK, book)


def refs_of(folder: Path) -> list[ImageRef]:
    for number in range(NUM_FILES):
        if number % 7:
            (folder / f"{number:03}").write_text(str(number))
    return [ImageRef("file", (f"{number:03}",)) for number in range(NUM_FILES)]


def asked_of_mirror(
    template: str, network_policy: NetworkPolicy, *paths: str
) -> tuple[list[str], str | None]:
    """Return the reason of each file that a mirror is asked for, and what trouble is seen."""
    config = FetchConfig(mirror=template, num_threads=2)
    book = create_shared_limiter(build_rate_limiter(config, network_policy), num_workers=0)
    source = ImageSource("/nowhere", config, network_policy, book)
    refs = [ImageRef("file", (path,)) for path in paths]
    found = dict(source.fetch(refs, lambda ref, fetched: (ref, fetched.reason)))
    return [found[ref] for ref in refs], source.outage_reason()


def test_a_mirror_is_asked_by_name_and_never_above_its_place() -> None:
    answers = dict.fromkeys(("/p/train/1.jpg", "/p/a%2520b"), lambda h: h.send(200, b"GIF89a"))
    with running(WebServer("127.0.0.1", answers)) as web:
        host = f"127.0.0.1:{web.port}"
        network_policy = NetworkPolicy(frozenset([host]))
        paths = ("train/1.jpg", "a%20b", "gone.jpg", "../secret", "a/../../secret")
        found = asked_of_mirror(f"http://{host}/p/{{path}}", network_policy, *paths)
        by_key = asked_of_mirror(f"http://{host}/p/{{key}}/x", network_policy, "...jpg")
    assert found == (["ok", "ok", "http_404", "bad_url", "bad_url"], None)
    assert by_key == (["bad_url"], None)
    assert set(web.asked) == {*answers, "/p/gone.jpg"}


def test_a_mirror_that_is_not_there_is_trouble_and_not_many_dead_pictures() -> None:
    with running(name_server(Names({}))) as dns:
        network_policy = NetworkPolicy(dns_server=f"127.0.0.1:{dns.server_address[1]}")
        _, trouble = asked_of_mirror(
            "http://misspelt.test/{path}", network_policy, "1.jpg", "2.jpg"
        )
    assert "the mirror misspelt.test:80 could not be reached" in str(trouble)


def test_a_mirror_that_may_not_be_asked_is_refused_at_once() -> None:
    config = FetchConfig(mirror="http://mirror.test:8080/{path}")
    with pytest.raises(ConfigError, match=r"port 8080 is not the default 80.*--allow-host"):
        build_rate_limiter(config)
    allowed = NetworkPolicy(frozenset(["mirror.test:8080"]))
    assert build_rate_limiter(config, allowed).mirror == "mirror.test:8080"
    assert build_rate_limiter(FetchConfig(mirror="http://{key}.test/x")).mirror is None


@pytest.mark.parametrize("num_threads", [1, 3, 16])
def test_every_file_comes_once_and_in_order_also_those_that_are_not_there(
    tmp_path: Path, num_threads: int
) -> None:
    def told(ref: ImageRef, fetched: FetchResult) -> tuple[str, str]:
        return ref.value[0], fetched.data.decode() if fetched.data else fetched.reason

    found = list(source_of(tmp_path, num_threads).fetch(refs_of(tmp_path), told))
    assert found == [
        (f"{number:03}", str(number) if number % 7 else "missing_file")
        for number in range(NUM_FILES)
    ]


def test_reading_keeps_near_to_what_was_taken(
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
        taken.append(ref)  # noqa: PERF402  # How many are taken so far is what is asked.
    assert len(read) == NUM_FILES
    # Three threads' runs, and the one that is being taken.
    assert max(ahead) <= 4 * sources._RUN
