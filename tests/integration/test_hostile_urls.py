"""`d2i preprocess` against hostile servers: every URL ends as a ledger row with its reason."""

from __future__ import annotations

import gzip
import hashlib
import json
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from d2i.preprocess.ledger import read_ledger
from tests.bombs import png_bomb, webp_bomb
from tests.integration.chats import encode_image, noise_image, reasons, sends, write_chats
from tests.integration.commands import preprocess
from tests.processes import COMMAND, run_measured, run_process
from tests.servers import Answer, Handler, Names, WebServer, name_server, running
from tests.shared import needs_shared

pytestmark = needs_shared


def redirects(target: str) -> Answer:
    return lambda handler: handler.send(302, Location=target)


def drips(handler: Handler) -> None:
    handler.send_response(200)
    handler.end_headers()
    while not handler.server.stopped.wait(0.2):
        handler.wfile.write(b"\xff")
        handler.wfile.flush()


def drips_headers(handler: Handler) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
    while not handler.server.stopped.wait(0.2):
        handler.wfile.write(b"X: y\r\n")
        handler.wfile.flush()


def is_endless(handler: Handler) -> None:
    handler.send_response(200)
    handler.end_headers()
    while not handler.server.stopped.is_set():
        handler.wfile.write(bytes(1 << 16))


def is_busy_once(handler: Handler) -> None:
    if handler.server.asked["/busy-once"] == 1:
        handler.send(429, Retry_After="1")
    else:
        handler.send(200, noise_image())


def sends_long_reason(handler: Handler) -> None:
    handler.wfile.write(b"HTTP/1.1 418 " + b"x" * 60_000 + b"\r\nContent-Length: 0\r\n\r\n")


def exif_turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return noise_image(exif=exif)


GOOD = noise_image()
GREY = encode_image(Image.new("RGB", (64, 64), "grey"), "PNG")
BUSY = sends(b"", 429, Retry_After="3000")
CASES: dict[str, tuple[Answer, str]] = {
    "good": (sends(GOOD), "ok"),
    "packed": (sends(gzip.compress(GOOD), Content_Encoding="gzip"), "ok"),
    "gif": (sends(noise_image("GIF")), "ok"),
    "webp": (sends(noise_image("WEBP")), "ok"),
    "progressive": (sends(noise_image(progressive=True)), "ok"),
    "exif": (sends(exif_turned()), "ok"),
    "cmyk": (sends(encode_image(Image.new("CMYK", (64, 64)), "JPEG")), "ok"),
    "sixteen-bit": (
        sends(encode_image(Image.fromarray(np.full((64, 64), 999, np.uint16)), "PNG")),
        "ok",
    ),
    "animated": (
        sends(noise_image("GIF", save_all=True, append_images=[Image.new("RGB", (80, 64))])),
        "ok",
    ),
    "busy-once": (is_busy_once, "ok"),
    "redirected": (redirects("/good"), "ok"),
    "gone": (sends(b"", 410), "http_410"),
    "broken-server": (sends(b"", 500), "http_500"),
    "talkative": (sends_long_reason, "http_418"),
    "forbidden-by-robots": (sends(GOOD, X_Robots_Tag="noai"), "robots"),
    "forbidden-to-us": (sends(GOOD, X_Robots_Tag="d2i: noimageai"), "robots"),
    "forbidden-to-others": (sends(GOOD, X_Robots_Tag="otherbot: noai"), "ok"),
    "placeholder": (redirects("/photo_unavailable_l.png"), "placeholder"),
    "placeholder-by-hash": (sends(GREY), "placeholder"),
    "loop": (redirects("/loop"), "too_many_redirects"),
    "to-a-file": (redirects("file:///etc/hostname"), "bad_url"),
    "to-data": (redirects("data:image/png;base64,AAAA"), "bad_url"),
    "to-an-unknown-host": (redirects("http://nowhere.test/x.jpg"), "no_such_host"),
    "drip": (drips, "timeout"),
    "drip-headers": (drips_headers, "timeout"),
    "endless": (is_endless, "too_many_bytes"),
    "gzip-bomb": (sends(gzip.compress(bytes(50 << 20)), Content_Encoding="gzip"), "too_many_bytes"),
    "odd-encoding": (sends(GOOD, Content_Encoding="br"), "encoded_body"),
    "png-bomb": (sends(png_bomb(16384)), "too_large"),
    "webp-bomb": (sends(webp_bomb(16_383)), "too_large"),
    "tall": (sends(encode_image(Image.new("RGB", (1, 5000)), "PNG")), "too_small"),
    "odd": (sends(encode_image(Image.new("RGB", (20, 5000)), "PNG")), "odd_aspect"),
    "html": (sends(b"<html>a page</html>"), "not_an_image"),
    "svg": (sends(b"<svg xmlns='http://www.w3.org/2000/svg'/>"), "not_an_image"),
    "bmp": (sends(noise_image("BMP")), "not_an_image"),
    "empty": (sends(b""), "not_an_image"),
    "truncated": (sends(GOOD[: len(GOOD) // 2]), "decode_error"),
}


@pytest.fixture
def servers() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


LIMITS = [
    part
    for setting in (
        "fetch.timeout_s=4",
        "fetch.max_image_mib=2",
        "fetch.max_host_requests_per_s=1000",
        "fetch.contact=us@example.org",
        f'fetch.placeholder_sha256=["{hashlib.sha256(GREY).hexdigest()}"]',
    )
    for part in ("--set", setting)
]


def peak_bytes(source: Path, out: Path, *extra: str) -> int:
    """Run `d2i preprocess`; return its peak memory in bytes."""
    done, peak = run_measured(
        *("preprocess", "--corpus", "jsonl", "--source", source, "--out", out),
        *("--recipe", "demo", "--workers", "0", *extra),
    )
    assert done.returncode == 0, done.stderr
    return peak


def test_ssrf_guard_and_limits_record_reason_for_every_url(
    tmp_path: Path, settings: list[str], servers: ExitStack
) -> None:
    answers = {f"/{name}": answer for name, (answer, _) in CASES.items()}
    answers["/photo_unavailable_l.png"] = sends(noise_image("PNG"))
    web = servers.enter_context(running(WebServer("127.0.0.1", answers)))
    canary = servers.enter_context(running(WebServer("127.0.0.1", {})))
    names = Names({"web.test": ["127.0.0.1"], "inside.test": ["10.0.0.1"]})
    dns = servers.enter_context(running(name_server(names)))
    web.answers["/to-the-canary"] = redirects(f"http://127.0.0.1:{canary.port}/secret")
    web.answers["/to-inside"] = redirects("http://inside.test/secret")

    host = f"web.test:{web.port}"
    urls = {name: [f"http://{host}/{name}"] for name in (*CASES, "missing")}
    expected = {name: reason for name, (_, reason) in CASES.items()} | {"missing": "http_404"}
    forbidden = {
        "to-the-canary": f"http://{host}/to-the-canary",
        "to-inside": f"http://{host}/to-inside",
        "loopback": f"http://127.0.0.1:{canary.port}/secret",
        "metadata": "http://169.254.169.254/latest/meta-data/",
        "decimal": "http://2130706433/secret",
        "hex": "http://0x7f000001/secret",
        "six": "http://[::ffff:127.0.0.1]/secret",
        "by-name": "http://inside.test/secret",
        "other-port": f"http://web.test:{canary.port}/secret",
    }
    urls |= {name: [url] for name, url in forbidden.items()}
    # On its own host, which stays in backoff for all of the 3,000 seconds.
    busy_web = servers.enter_context(running(WebServer("127.0.0.1", {"/busy": BUSY})))
    urls["busy"] = [f"http://127.0.0.1:{busy_web.port}/busy"]
    expected["busy"] = "http_429"
    expected |= dict.fromkeys(forbidden, "refused_address")

    source = write_chats(tmp_path / "chats", urls)
    out = tmp_path / "data"
    dns_server = f"127.0.0.1:{dns.server_address[1]}"
    network = ("--allow-host", host, "--dns-server", dns_server)
    network += ("--allow-host", f"127.0.0.1:{busy_web.port}")
    baseline_source = write_chats(tmp_path / "modest", {"good": urls["good"]})
    baseline = peak_bytes(baseline_source, tmp_path / "modest-data", *network, *LIMITS, *settings)
    peak = peak_bytes(source, out, *network, *LIMITS, *settings)

    assert reasons(out) == expected
    # The decompressed body of one thread, and the largest image that is decoded here.
    assert peak - baseline < 150 << 20
    assert not canary.asked
    assert names.asked["inside.test"] <= 2
    assert all("us@example.org" in agent for agent in web.user_agents)
    rows = {row.key: row for row in read_ledger(str(out / "test"))}
    assert rows["test-busy-once-0-0"].attempts == 2
    assert rows["test-busy-0-0"].status == "passing"
    assert rows["test-busy-0-0"].attempts == 1
    assert rows["test-gone-0-0"].status == "permanent"
    assert len(rows["test-talkative-0-0"].detail) <= 501
    assert rows["test-redirected-0-0"].final_url == f"http://{host}/good"


def test_deadline_and_circuit_breaker_stop_silent_host(
    tmp_path: Path, settings: list[str], servers: ExitStack
) -> None:
    """Its backlog accepts connections and nothing answers: 3 timeouts, then a dead host."""
    web = servers.enter_context(running(WebServer("127.0.0.1", {"/good": sends(GOOD)})))
    silent = servers.enter_context(socket.create_server(("127.0.0.1", 0), backlog=64))
    hosts = [f"127.0.0.1:{web.port}", f"127.0.0.1:{silent.getsockname()[1]}"]
    urls = {"good": [f"http://{hosts[0]}/good"]}
    urls |= {f"silent{n}": [f"http://{hosts[1]}/{n}"] for n in range(12)}
    source, out = write_chats(tmp_path / "chats", urls), tmp_path / "data"
    network = [part for host in hosts for part in ("--allow-host", host)]
    one = ["--set", "fetch.num_threads=1", "--set", "fetch.timeout_s=0.5"]
    preprocess("jsonl", source, out, *network, *settings, *one)
    found = list(reasons(out).values())
    assert found.count("ok") == 1
    assert found.count("timeout") == 3
    assert found.count("dead_host") == 9


def test_outage_is_detected_and_not_recorded_as_dead_hosts(
    tmp_path: Path, settings: list[str]
) -> None:
    closed = []
    for _ in range(10):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            closed.append(f"127.0.0.1:{listener.getsockname()[1]}")
    source = write_chats(
        tmp_path / "chats", {f"c{n}": [f"http://{host}/x.jpg"] for n, host in enumerate(closed)}
    )
    out = tmp_path / "data"
    network = [part for host in closed for part in ("--allow-host", host)]
    done = run_process(
        *("preprocess", "--corpus", "jsonl", "--source", source, "--out", out),
        *("--recipe", "demo", "--workers", "0", *settings, *network),
    )
    assert done.returncode == 2
    assert "different hosts could not be reached" in done.stderr
    assert "--set fetch.num_trouble_hosts=0" in done.stderr
    assert not list(out.rglob("ledger/*.parquet"))
    off = ("--set", "fetch.num_trouble_hosts=0")
    done = run_process(
        *("preprocess", "--corpus", "jsonl", "--source", source, "--out", out),
        *("--recipe", "demo", "--workers", "0", *settings, *network, *off),
    )
    assert done.returncode == 1
    assert "0 of 10 instances became a sample; most common reason: connect" in done.stderr
    assert list(reasons(out).values()) == ["connect"] * 10


# `make test` kills such jobs on Ray in `test_fetch_stage.py` and `test_kill_matrix.py`.
@pytest.mark.soak
def test_killed_job_resumes_on_ray_workers_with_shared_rate_limit(
    tmp_path: Path, settings: list[str], servers: ExitStack
) -> None:
    """Two workers, one host: after a kill and a restart each image is written once."""
    answers = {f"/{n}": sends(noise_image(size=(64 + n, 64))) for n in range(12)}
    web = servers.enter_context(running(WebServer("127.0.0.1", answers)))
    host = f"127.0.0.1:{web.port}"
    source = write_chats(tmp_path / "chats", {f"c{n}": [f"http://{host}/{n}"] for n in range(12)})
    out = tmp_path / "data"
    command = (
        *("preprocess", "--corpus", "jsonl", "--source", source, "--out", out, "--recipe", "demo"),
        *("--workers", "2", "--allow-host", host, *settings),
        *("--set", "preprocess.num_samples_per_shard=4"),
    )
    killed = run_process(
        *command[:-4], "--workers", "0", *command[-2:], "--fault", "shard.index:kill:2"
    )
    assert killed.returncode == -signal.SIGKILL
    done = run_process(*command, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["splits"][0]["num_written"] == 12
    assert set(reasons(out).values()) == {"ok"}


def test_ctrl_c_interrupts_hanging_fetch(
    tmp_path: Path, settings: list[str], servers: ExitStack
) -> None:
    answers = {f"/{n}": drips for n in range(60)}
    web = servers.enter_context(running(WebServer("127.0.0.1", answers)))
    host = f"127.0.0.1:{web.port}"
    source = write_chats(tmp_path / "chats", {f"c{n}": [f"http://{host}/{n}"] for n in range(60)})
    command = (
        *("preprocess", "--corpus", "jsonl", "--source", source, "--out", tmp_path / "data"),
        *("--recipe", "demo", "--workers", "0", "--allow-host", host, *settings),
        *("--set", "fetch.timeout_s=5"),
    )
    # A shell that runs the tests in the background ignores SIGINT, and children inherit that.
    reset_sigint = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(
        [*COMMAND, *map(str, command)], stderr=subprocess.DEVNULL, preexec_fn=reset_sigint
    )
    try:
        assert web.was_asked.wait(120)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) != 0
    finally:
        process.kill()
        process.wait()
