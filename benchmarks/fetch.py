"""Speed of fetching URLs, compared with img2dataset's own downloader on the same server.

    python benchmarks/fetch.py --photos photos --num 2000 --repeats 5

Serves a directory of photographs on loopback and fetches `--num` URLs alternately, each time in a
separate process with one decoding core and 16 threads: by img2dataset 1.47 with its defaults
(`Downloader`, `Resizer`, `WebDatasetSampleWriter`) and by d2i (`ImageSource`, with decoding, then
JPEG as well). Both centre-crop to 256 and write JPEG at quality 95 to a tar. d2i resizes with
LANCZOS, as U-ViT does; img2dataset's default is AREA, which costs half as much, so for good URLs it
is also measured with LANCZOS. Two lists: only good URLs, and a mixed one with 10 % on dead hosts
(20 loopback listeners that never answer), 5 % slow (2 s), 5 % 404, 2 % 429 once, 3 % broken, with
the same timeout of 5 s for both. `--hosts` sets the number of hosts that the server represents
(ports, each a host to d2i's rate limiter): after a 429 d2i keeps the host in backoff for the second
that it asks for, and img2dataset not at all, so that with one host the 429s alone cost d2i 40 s.
Prints one JSON line: rows per second, CPU milliseconds per row, and the ratio of d2i's rate to each
other, medians and all repeats.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

NUM_THREADS, SIDE, QUALITY, PATIENCE_S, SLOW_S = 16, 256, 95, 5, 2.0
NUM_DEAD_HOSTS = 20
FILTERS = {"img2dataset": "area", "img2dataset, lanczos": "lanczos"}
"""The peer's ways to downscale an image; the first is its own choice."""
CONTESTANTS = {"good": (*FILTERS, "d2i"), "mixed": ("img2dataset", "d2i")}
Ports = dict[str, list[int]]
SHARES = {"dead": 0.10, "slow": 0.05, "gone": 0.05, "busy": 0.02, "broken": 0.03}


def make_servers(photos: Path, num: int) -> list[ThreadingHTTPServer]:
    """Return a server of photographs, `/KIND/N`, on a number of ports."""
    files = [path.read_bytes() for path in sorted(photos.rglob("*.jpg"))]
    seen: set[str] = set()

    class Photographs(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            _, kind, number = self.path.split("/")
            data = files[int(number) % len(files)]
            if kind == "gone":
                self.answer(404, b"")
            elif kind == "busy" and self.path not in seen:
                seen.add(self.path)
                self.answer(429, b"", **{"Retry-After": "1"})
            else:
                if kind == "slow":
                    time.sleep(SLOW_S)
                self.answer(200, data[: len(data) // 2] if kind == "broken" else data)

        def answer(self, status: int, body: bytes, **headers: str) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Stay quiet."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 1024

    return [Server(("127.0.0.1", 0), Photographs) for _ in range(num)]


def serve(photos: Path, num_hosts: int) -> None:
    """Print the ports and those of the dead hosts, then serve until killed."""
    with contextlib.ExitStack() as stack:
        dead = [
            stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=1024))
            for _ in range(NUM_DEAD_HOSTS)
        ]
        servers = make_servers(photos, num_hosts)
        ports = {
            "live": [server.server_address[1] for server in servers],
            "dead": [one.getsockname()[1] for one in dead],
        }
        print(json.dumps(ports), flush=True)
        for server in servers[1:]:
            threading.Thread(target=server.serve_forever, daemon=True).start()
        servers[0].serve_forever()


def make_urls(ports: Ports, num: int, list_name: str) -> list[str]:
    """Return the list of URLs, with the kinds evenly spread."""
    live, dead = ports["live"], ports["dead"]
    urls = [f"http://127.0.0.1:{live[n % len(live)]}/good/{n}" for n in range(num)]
    if list_name == "mixed":
        place = 0
        for kind, share in SHARES.items():
            for _ in range(round(num * share)):
                # A step that is coprime to the length visits every index once.
                place = (place + 7919) % num
                hosts = dead if kind == "dead" else live
                port = hosts[place % len(hosts)]
                urls[place] = f"http://127.0.0.1:{port}/{kind}/{place}"
    return urls


def by_img2dataset(urls: list[str], directory: Path, downscale: str) -> int:
    """Fetch with img2dataset's own classes; return the number of rows it wrote."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from img2dataset.downloader import Downloader
    from img2dataset.resizer import Resizer
    from img2dataset.writer import WebDatasetSampleWriter

    table = pa.table({"url": urls})
    with (
        pa.OSFile(str(directory / "in.arrow"), "wb") as file,
        pa.ipc.new_file(file, table.schema) as writer,
    ):
        writer.write_table(table)
    download = Downloader(
        WebDatasetSampleWriter,
        Resizer(
            *(SIDE, "center_crop"),
            resize_only_if_bigger=False,
            downscale_interpolation=downscale,
            encode_quality=QUALITY,
        ),
        *(NUM_THREADS, False, False, str(directory), ["url"], PATIENCE_S, len(urls), 5),
        *(None, None, "jpg", 0, "d2i", None),
    )
    download((0, str(directory / "in.arrow")))
    return int(pq.read_metadata(directory / "00000.parquet").num_rows)


def by_d2i(urls: list[str], directory: Path) -> int:
    """Fetch with d2i's classes; return the number of rows."""
    from PIL import Image

    from d2i.cluster import Session
    from d2i.config import FetchConfig, ImageConfig
    from d2i.dialog import ImageRef
    from d2i.fetch.rate_limiter import create_shared_limiter
    from d2i.fetch.sources import ImageSource, NetworkPolicy, build_rate_limiter
    from d2i.images.sandbox import Decoder
    from d2i.preprocess.workers.fetch_worker import open_image
    from d2i.preprocess.workers.messages import SourceImage

    config = FetchConfig(num_threads=NUM_THREADS, timeout_s=PATIENCE_S, max_host_requests_per_s=1e6)
    hosts = frozenset(url.split("/")[2] for url in urls)
    book = create_shared_limiter(build_rate_limiter(config), Session(0))
    source = ImageSource(str(directory), config, NetworkPolicy(hosts, "127.0.0.1"), book)
    decoder = Decoder(ImageConfig(resolution=SIDE), config.decode_timeout_s, config.max_decode_mib)
    with tarfile.open(directory / "out.tar", "w") as tar:

        def write(opened: SourceImage) -> None:
            buffer = io.BytesIO()
            Image.fromarray(opened.pixels).save(buffer, "JPEG", quality=QUALITY)
            info = tarfile.TarInfo(f"{opened.sha256}.jpg")
            info.size = buffer.tell()
            buffer.seek(0)
            tar.addfile(info, buffer)

        counts: Counter[str] = Counter()
        for found in source.fetch(
            [ImageRef("urls", (url,)) for url in urls],
            lambda ref, fetched: open_image(ref, fetched, decoder, is_kept=False),
        ):
            counts[found.fetched.reason] += 1
            if found.image is not None:
                write(found.image)
    decoder.close()
    print(json.dumps(counts), file=sys.stderr)
    return counts.total()


def measure(who: str, urls: list[str]) -> dict[str, float]:
    """Fetch the list once in this process."""
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
    # Imports are not timed.
    import img2dataset.downloader
    import img2dataset.resizer  # noqa: F401

    if who == "d2i":
        import d2i.preprocess.workers.fetch_worker  # noqa: F401
    with tempfile.TemporaryDirectory() as directory:
        start, cpu_start = time.perf_counter(), time.process_time()
        if who == "d2i":
            num_rows = by_d2i(urls, Path(directory))
        else:
            num_rows = by_img2dataset(urls, Path(directory), FILTERS[who])
        seconds, cpu_s = time.perf_counter() - start, time.process_time() - cpu_start
    return {
        "num_rows": num_rows,
        "seconds": seconds,
        "per_s": len(urls) / seconds,
        "cpu_ms": cpu_s / len(urls) * 1e3,
    }


@contextlib.contextmanager
def serving(photos: Path, num_hosts: int) -> Iterator[Ports]:
    """Run the server in a separate process."""
    command = [sys.executable, __file__, "--photos", str(photos), "--hosts", str(num_hosts)]
    command.append("--serve")
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield json.loads(process.stdout.readline())
        finally:
            process.kill()


def repeat(photos: Path, num: int, num_hosts: int, list_name: str) -> dict[str, dict[str, float]]:
    """Measure all once, one after the other, each with its own server."""
    found = {}
    for who in CONTESTANTS[list_name]:
        with (
            serving(photos, num_hosts) as ports,
            tempfile.NamedTemporaryFile("w", suffix=".json") as file,
        ):
            json.dump(make_urls(ports, num, list_name), file)
            file.flush()
            command = [sys.executable, __file__, "--measure", who, "--urls", file.name]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found[who] = json.loads(done.stdout.splitlines()[-1])
        print(f"{list_name}: {who}: {found[who]}", file=sys.stderr)
    return found


def summary(runs: list[dict[str, dict[str, float]]]) -> dict[str, Any]:
    """Summarize the repeats."""
    return {
        "num_rows": {who: runs[0][who]["num_rows"] for who in runs[0]},
        "per_s": {who: medians(run[who]["per_s"] for run in runs) for who in runs[0]},
        "cpu_ms": {who: medians(run[who]["cpu_ms"] for run in runs) for who in runs[0]},
        "ratio": {
            who: medians(run["d2i"]["per_s"] / run[who]["per_s"] for run in runs)
            for who in runs[0]
            if who != "d2i"
        },
    }


def medians(values: Iterable[float]) -> dict[str, Any]:
    """Return the median and all values."""
    rounded = [round(value, 2) for value in values]
    return {"median": round(statistics.median(rounded), 2), "all": rounded}


def machine() -> dict[str, object]:
    """Describe the machine."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {"processor": names[0] if names else platform.machine(), "cores": len(names)}


def main() -> None:
    """Measure both lists, and print one JSON line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--photos", type=Path, help="Directory of JPEG files.")
    parser.add_argument("--num", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--lists", choices=("good", "mixed"), nargs="+", default=["good", "mixed"])
    parser.add_argument("--hosts", type=int, default=20)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--urls", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.photos, options.hosts)
    elif options.measure:
        print(json.dumps(measure(options.measure, json.loads(options.urls.read_text()))))
    else:
        found = {
            name: summary(
                [
                    repeat(options.photos, options.num, options.hosts, name)
                    for _ in range(options.repeats)
                ]
            )
            for name in options.lists
        }
        print(json.dumps({"machine": machine(), "python": platform.python_version(), **found}))


if __name__ == "__main__":
    main()
