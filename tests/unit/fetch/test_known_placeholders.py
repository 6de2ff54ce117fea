"""Known placeholder images, and the fallback to an image's next URL."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from d2i.cluster import Session
from d2i.config import FetchConfig, apply_settings
from d2i.dialog import ImageRef
from d2i.errors import ConfigError
from d2i.fetch.known_placeholders import KnownPlaceholders
from d2i.fetch.rate_limiter import create_shared_limiter
from d2i.fetch.sources import ImageSource, NetworkPolicy, build_rate_limiter
from d2i.fetch.ssrf_guard import allowed_hosts
from tests.servers import WebServer, running

GREY = b"grey"
GOOD = b"GIF89a good"
GREY_SHA256 = hashlib.sha256(GREY).hexdigest()


@pytest.mark.parametrize(
    ("data", "url", "is_one"),
    [
        (b"x", "http://a.test/photo_unavailable_l.png?zz=1", True),
        (b"x", "http://a.test/x.png?of=photo_unavailable", False),
        (GREY, "http://a.test/x.png", True),
        (GREY, None, True),
        (b"x", None, False),
    ],
)
def test_known_placeholder_is_found_by_url_or_sha256(
    data: bytes, url: str | None, is_one: bool
) -> None:
    assert (KnownPlaceholders(frozenset([GREY_SHA256])).why(data, url) is not None) is is_one


def test_next_url_is_tried_after_placeholder(tmp_path: Path) -> None:
    config = FetchConfig(placeholder_sha256=(GREY_SHA256,), num_threads=1)
    (tmp_path / "grey.jpg").write_bytes(GREY)
    answers = {"/grey": lambda h: h.send(200, GREY), "/good": lambda h: h.send(200, GOOD)}
    with running(WebServer("127.0.0.1", answers)) as web:
        host = f"127.0.0.1:{web.port}"
        network_policy = NetworkPolicy(allowed_hosts([host]), "127.0.0.1")
        limiter = create_shared_limiter(build_rate_limiter(config), Session(0))
        source = ImageSource(str(tmp_path), config, network_policy, limiter)
        both = ImageRef("urls", (f"http://{host}/grey", f"http://{host}/good"))
        only = ImageRef("urls", (f"http://{host}/grey",))
        file = ImageRef("file", ("grey.jpg",))
        found = dict(source.fetch([both, only, file], lambda ref, f: (ref, (f.reason, f.data))))
    assert found[both] == ("ok", GOOD)
    assert found[only] == ("placeholder", None)
    assert found[file] == ("placeholder", None)


def test_placeholder_sha256_must_have_64_digits() -> None:
    with pytest.raises(ConfigError, match="placeholder_sha256"):
        apply_settings(FetchConfig(), ['placeholder_sha256=["abc"]'])
