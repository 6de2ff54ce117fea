"""`d2i preprocess --proxy`: the proxy resolves hosts and may reject them; no login is leaked."""

from __future__ import annotations

import socket
import subprocess
from contextlib import ExitStack
from pathlib import Path

import pytest

from d2i.preprocess.ledger import read_ledger
from tests.integration.chats import noise_image, reasons, sends, write_chats
from tests.processes import run_process
from tests.servers import ProxyServer, WebServer, running, secured, self_made_certificate
from tests.shared import needs_shared

pytestmark = needs_shared

PASSWORD = "open-sesame-7"


def preprocess(
    source: Path, out: Path, proxy: str, settings: list[str]
) -> subprocess.CompletedProcess[str]:
    return run_process(
        *("preprocess", "--corpus", "jsonl", "--source", source, "--out", out),
        *("--recipe", "demo", "--workers", "0", "--proxy", proxy, *settings),
        *("--set", "fetch.timeout_s=5"),
    )


def test_all_requests_go_through_proxy(
    tmp_path: Path, settings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    good = sends(noise_image())
    certificate = self_made_certificate(tmp_path, "safe.test")
    urls = {
        "plain": "http://web.test/good",
        "tls": "https://safe.test/good",
        "sent-on": "http://web.test/to-tls",
        "gone": "https://safe.test/gone",
        "denied": "http://denied.test/good",
        "denied-tls": "https://denied.test/good",
        "unknown": "https://unknown.test/good",
        "not-its-name": "https://web.test/good",
        "metadata": "http://169.254.169.254/latest",
        "loopback-tls": "https://127.0.0.1/secret",
        "other-port": "http://web.test:8080/good",
    }
    answers = {"/good": good, "/to-tls": lambda h: h.send(302, Location="https://safe.test/good")}
    with ExitStack() as stack:
        web = stack.enter_context(running(WebServer("127.0.0.1", answers)))
        safe = secured(WebServer("127.0.0.1", {"/good": good}), certificate)
        stack.enter_context(running(safe))
        places = {
            "web.test:80": ("127.0.0.1", web.port),
            "web.test:443": ("127.0.0.1", safe.port),
            "safe.test:443": ("127.0.0.1", safe.port),
        }
        forbidden = ("denied.test:80", "denied.test:443")
        proxy = stack.enter_context(running(ProxyServer(f"us:{PASSWORD}", places, *forbidden)))
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        source = write_chats(tmp_path / "chats", {name: [url] for name, url in urls.items()})
        out = tmp_path / "data"
        address = f"http://us:{PASSWORD}@127.0.0.1:{proxy.port}"
        done = preprocess(source, out, address, settings)
    assert done.returncode == 0, done.stderr
    assert reasons(out) == {
        "plain": "ok",
        "tls": "ok",
        "sent-on": "ok",
        "gone": "http_404",
        "denied": "proxy_refused",
        "denied-tls": "proxy_refused",
        "unknown": "connect",
        "not-its-name": "tls",
        "metadata": "refused_address",
        "loopback-tls": "refused_address",
        "other-port": "refused_address",
    }
    asked = {name.rpartition(":")[0] for name in proxy.asked}
    assert asked == {"web.test", "safe.test", "denied.test", "unknown.test"}
    written = b"".join(path.read_bytes() for path in out.rglob("*") if path.is_file())
    assert PASSWORD not in done.stdout + done.stderr
    assert PASSWORD.encode() not in written
    rows = {row.key: row for row in read_ledger(str(out / "test"))}
    assert rows["test-sent-on-0-0"].final_url == "https://safe.test/good"


def test_unreachable_proxy_stops_job(tmp_path: Path, settings: list[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    urls = {f"c{n}": [f"http://web.test/{n}.jpg"] for n in range(30)}
    source = write_chats(tmp_path / "chats", urls)
    out = tmp_path / "data"
    done = preprocess(source, out, f"http://us:{PASSWORD}@127.0.0.1:{port}", settings)
    assert done.returncode == 2
    assert "the proxy could not be reached" in done.stderr
    assert not list(out.rglob("ledger/*.parquet"))


@pytest.mark.parametrize(
    ("proxy", "shown"),
    [
        (f"https://us:{PASSWORD}@proxy.test:4750", "proxy.test:4750"),
        (f"http://us:{PASSWORD}@proxy.test", "proxy.test"),
        (f"us:{PASSWORD}@proxy.test:4750", "proxy.test:4750"),
        (f"http://us:{PASSWORD}@[proxy.test:4750", "[proxy.test:4750"),
    ],
)
def test_proxy_must_be_url_and_its_password_is_not_shown(
    tmp_path: Path, proxy: str, shown: str
) -> None:
    source = write_chats(tmp_path / "chats", {"a": ["http://web.test/x.jpg"]})
    done = preprocess(source, tmp_path / "data", proxy, [])
    assert done.returncode == 2
    assert f"--proxy {shown}: expected http://HOST:PORT" in done.stderr
    assert PASSWORD not in done.stderr
