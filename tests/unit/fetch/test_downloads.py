"""Images already downloaded by img2dataset, in the layouts of its own writers."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from img2dataset.downloader import Downloader
from img2dataset.resizer import Resizer
from img2dataset.writer import FilesSampleWriter, ParquetSampleWriter, WebDatasetSampleWriter
from PIL import Image

from d2i.cluster import Session
from d2i.config import FetchConfig
from d2i.dialog import ImageRef
from d2i.errors import ConfigError, DataError
from d2i.fetch import downloads
from d2i.fetch.downloads import check_downloads, open_downloads
from d2i.fetch.rate_limiter import create_shared_limiter
from d2i.fetch.result import FetchResult
from d2i.fetch.sources import PUBLIC_NETWORK, ImageSource, build_rate_limiter
from d2i.preprocess.job import PreprocessRequest, plan_job, preprocess
from d2i.preprocess.ledger import read_ledger
from d2i.preprocess.repair import RepairRequest, repair
from d2i.recipes import resolve_recipe

WRITERS = {
    "webdataset": WebDatasetSampleWriter,
    "files": FilesSampleWriter,
    "parquet": ParquetSampleWriter,
}
FORMS = pytest.mark.parametrize("form", WRITERS)
ORIGINALS = {"resize_mode": "no", "disable_all_reencoding": True}
NOWHERE = "http://127.0.0.1:1/gone.jpg"
"""Rejected by the SSRF guard, which shows that a URL was requested."""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    open_downloads.cache_clear()


@pytest.fixture
def host(tmp_path: Path) -> Path:
    """Directory of files for img2dataset to download: four images, and one that is none."""
    files = tmp_path / "host"
    files.mkdir()
    rng = np.random.default_rng(0)
    for number in range(4):
        pixels = rng.integers(0, 256, (48, 64, 3), np.uint8)
        Image.fromarray(pixels).save(files / f"{number}.jpg")
    (files / "4.jpg").write_text("gone")
    return files


def download(urls: Iterable[str], out: Path, form: str, *, shard: int = 0, **resizing: Any) -> Path:
    """Let img2dataset download a shard of URLs."""
    out.mkdir(exist_ok=True)
    wanted = out.parent / "wanted.arrow"
    table = pa.table({"url": list(urls)})
    with pa.OSFile(str(wanted), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    Downloader(
        WRITERS[form],
        Resizer(
            image_size=32, **{"resize_mode": "border", "resize_only_if_bigger": False, **resizing}
        ),
        thread_count=1,
        save_caption=False,
        extract_exif=False,
        output_folder=str(out),
        column_list=["url"],
        timeout=5,
        number_sample_per_shard=1000,
        oom_shard_count=5,
        compute_hash="sha256",
        verify_hash_type=None,
        encode_format="jpg",
        retries=0,
        user_agent_token=None,
        disallowed_header_directives=None,
    ).download_shard((shard, str(wanted)))
    return out


def url_of(host: Path, number: int) -> str:
    return (host / f"{number}.jpg").as_uri()


def fetch(root: Path, directory: Path | str, *refs: ImageRef, **settings: Any) -> list[FetchResult]:
    config = FetchConfig(downloads=str(directory), num_threads=2, **settings)
    limiter = create_shared_limiter(build_rate_limiter(config), Session(0))
    source = ImageSource(str(root), config, PUBLIC_NETWORK, limiter)
    found = dict(source.fetch(refs, lambda ref, fetched: (ref, fetched)))
    return [found[ref] for ref in refs]


def by_url(*urls: str) -> ImageRef:
    return ImageRef("urls", urls)


def by_name(name: str) -> ImageRef:
    return ImageRef("file", (name,))


@FORMS
def test_downloaded_image_is_found_by_url_and_by_key(tmp_path: Path, host: Path, form: str) -> None:
    urls = [url_of(host, number) for number in range(5)]
    none = (host / "none.jpg").as_uri()
    directory = download([urls[4], *urls[:4], none], tmp_path / "d", form, **ORIGINALS)
    sent = [(host / f"{number}.jpg").read_bytes() for number in range(4)]
    (host / "0000003.jpg").write_bytes(b"its own")
    found = fetch(
        host,
        directory,
        by_url(urls[2]),
        by_url(NOWHERE, urls[3], urls[0]),
        by_url(NOWHERE),
        by_name("somewhere/00000002.jpg"),
        by_name("0000003.jpg"),
        by_name("00000077.jpg"),
    )
    assert [each.data for each in found] == [sent[2], sent[3], None, sent[1], b"its own", None]
    reasons = [each.reason for each in found]
    assert reasons == ["ok", "ok", "refused_address", "ok", "ok", "missing_file"]
    assert [each.final_url for each in found[:4]] == [urls[2], urls[3], NOWHERE, None]
    assert found[0].detail == f"downloaded by img2dataset: {directory}/00000, key 00000003"
    # An image that img2dataset could not download is requested.
    (gone,) = fetch(host, directory, by_url(none))
    assert gone.reason == "bad_url"
    bounded = fetch(host, directory, by_url(urls[0]), by_name("00000002.jpg"), max_image_mib=0.001)
    assert {each.reason for each in bounded} == {"too_many_bytes"}


@FORMS
def test_resized_downloads_are_reported(
    tmp_path: Path, host: Path, form: str, caplog: pytest.LogCaptureFixture
) -> None:
    urls = [url_of(host, number) for number in range(3)]
    directory = download(urls, tmp_path / "d", form)
    check_downloads(str(directory))
    assert "3 of 3 images were resized" in caplog.text
    (found,) = fetch(host, directory, by_url(urls[1]))
    assert found.data is not None
    assert Image.open(io.BytesIO(found.data)).size == (32, 32)
    assert "img2dataset, which re-encoded it: " in found.detail
    # A placeholder is also recognized by the original bytes of its host.
    sent = hashlib.sha256((host / "1.jpg").read_bytes()).hexdigest()
    (found,) = fetch(host, directory, by_url(urls[1]), placeholder_sha256=(sent,))
    assert found.reason == "placeholder"
    # No warning for images re-encoded at their own size, nor for originals.
    caplog.clear()
    for number, kept in enumerate(({"resize_mode": "no"}, ORIGINALS)):
        check_downloads(str(download(urls, tmp_path / f"kept{number}", form, **kept)))
    assert caplog.text == ""


def test_downloads_glob_joins_several_directories(
    tmp_path: Path, host: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    urls = [url_of(host, number) for number in range(4)]
    (tmp_path / "all").mkdir()
    for number, form in enumerate(WRITERS):
        download(urls[number : number + 2], tmp_path / "all" / form, form, **ORIGINALS)
    download(urls[3:], tmp_path / "all" / "files", "files", shard=7, **ORIGINALS)
    directory = f"{tmp_path}/all/*"
    found = fetch(
        host, directory, *map(by_url, urls), by_name("00000001.jpg"), by_name("00007000.jpg")
    )
    assert [each.data for each in found[:4]] == [Path(url[7:]).read_bytes() for url in urls]
    assert found[4].reason == "ambiguous_file"
    assert found[5].data == found[3].data
    assert len(open_downloads(directory)) == 7
    # Workers, and a later repair, may run in another directory.
    monkeypatch.chdir(tmp_path)
    assert resolve_recipe("demo", ["fetch.downloads=all/*"]).fetch.downloads == directory


def test_downloads_read_every_parquet_row_group(tmp_path: Path) -> None:
    names = ("url", "key", "status")
    schema = pa.schema([(name, pa.string()) for name in names])
    writer = ParquetSampleWriter(0, str(tmp_path), False, 5, schema, "png")
    for number in range(230):
        data = None if number % 3 else b"%d" % number
        meta = {
            "url": f"http://h/{number}",
            "status": "failed_to_resize" if number % 3 else "success",
        }
        writer.write(data, f"{number:09}", None, meta)
    writer.close()
    assert pq.ParquetFile(tmp_path / "00000.parquet").num_row_groups == 3
    numbers = (0, 15, 99, 102, 198, 228)
    read = fetch(tmp_path, tmp_path, *(by_url(f"http://h/{number}") for number in numbers))
    assert [each.data for each in read] == [b"%d" % number for number in numbers]
    # So are a mirror's files.
    (found,) = fetch(tmp_path, tmp_path, by_name("a/99.png"), mirror="http://h/{key}")
    assert (found.data, found.final_url) == (b"99", "http://h/99")
    assert open_downloads(str(tmp_path)).find_url("http://h/1") is None
    assert open_downloads(str(tmp_path)).find_key(f"{1:09}") == []


@FORMS
def test_damaged_or_lost_download_is_read_error(tmp_path: Path, host: Path, form: str) -> None:
    urls = [url_of(host, number) for number in range(3)]
    directory = download(urls, tmp_path / "d", form, **ORIGINALS)
    open_downloads(str(directory))
    holders = {"webdataset": "*.tar", "files": "*/*1.jpg", "parquet": "*.parquet"}
    (holder,) = directory.glob(holders[form])
    whole, sent = holder.read_bytes(), (host / "1.jpg").read_bytes()
    middle = whole.index(sent[2000:2032])
    holder.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    (found,) = fetch(host, directory, by_url(urls[1]))
    assert (found.data, found.reason) == (None, "read_error")
    assert "00000" in found.detail
    holder.unlink()
    if form == "files":
        (found,) = fetch(host, directory, by_url(urls[1]))
        assert (found.reason, "no 00000001.jpg" in found.detail) == ("read_error", True)
        return
    with pytest.raises(DataError, match=r"fetch\.downloads|the tar is gone"):
        fetch(host, directory, by_url(urls[1]))


def test_invalid_downloads_directory_raises_before_planning(tmp_path: Path, host: Path) -> None:
    def error_of(directory: object) -> str:
        open_downloads.cache_clear()
        (host / "train.jsonl").write_text(
            '{"turns": [{"text": "a", "images": ["https://h/1.jpg"]}]}'
        )
        recipe = resolve_recipe("demo", [f"fetch.downloads={directory}"])
        request = PreprocessRequest("jsonl", str(host), str(tmp_path / "out"), recipe)
        with pytest.raises(DataError) as caught:
            plan_job(request)
        assert not (tmp_path / "out").exists()
        return str(caught.value)

    assert "got no 00000.parquet" in error_of(tmp_path / "nowhere")
    assert "got no 00000.parquet" in error_of(host)
    with pytest.raises(ConfigError, match="got a web URL"):
        open_downloads("https://h/d")
    gone = download([url_of(host, 4)], tmp_path / "gone", "webdataset")
    assert "without any downloaded image" in error_of(gone)
    directory = download([url_of(host, 1)], tmp_path / "d", "webdataset")
    parquet = directory / "00000.parquet"
    whole = parquet.read_bytes()
    (directory / "00000.tar").unlink()
    assert "1 images, but they are missing" in error_of(directory)
    (directory / "00000.tar").touch()
    for damaged in (whole[: len(whole) // 2], b"", whole[:-9] + b"\0" * 9):
        parquet.write_bytes(damaged)
        assert f"{parquet} is damaged" in error_of(directory)
    pq.write_table(pa.table({"url": ["a"], "caption": ["b"]}), parquet)
    assert "lacks key, status" in error_of(directory)


def test_preprocess_and_repair_from_downloads(tmp_path: Path, host: Path) -> None:
    urls = [f"https://example.org/{number}.jpg" for number in range(3)]
    directory = download(
        [url_of(host, n) for n in range(3)], tmp_path / "d", "webdataset", **ORIGINALS
    )
    parquet = directory / "00000.parquet"
    table = pq.read_table(parquet)
    # As if they had come from a web host.
    pq.write_table(table.set_column(table.column_names.index("url"), "url", [urls]), parquet)
    chats = [{"id": url, "turns": [{"text": "a", "images": [url]}]} for url in [*urls, NOWHERE]]
    (host / "test.jsonl").write_text("\n".join(map(json.dumps, chats)))
    out = tmp_path / "out"
    recipe = resolve_recipe("demo", [f"fetch.downloads={directory}"])
    request = PreprocessRequest("jsonl", str(host), str(out), recipe)
    (summary,) = preprocess(request, Session(0), lambda _: None)
    assert (summary.num_written, summary.failures) == (3, {"refused_address": 1})
    rows = {row.image: row for row in read_ledger(str(out / "test"))}
    for number, url in enumerate(urls):
        sent = (host / f"{number}.jpg").read_bytes()
        assert rows[url].sha256 == hashlib.sha256(sent).hexdigest()
        assert (rows[url].final_url, f"{directory}/00000" in rows[url].detail) == (url, True)
    (shard,) = (out / "test").glob("*.tar")
    before = shard.read_bytes()
    shard.unlink()
    (repaired,) = repair(RepairRequest(str(out)), Session(0))
    assert (repaired.problems, shard.read_bytes()) == ((), before)


def test_downloads_index_is_cached_and_rebuilt_on_change(
    tmp_path: Path, host: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = download([url_of(host, 0)], tmp_path / "d", "webdataset", **ORIGINALS)
    assert len(open_downloads(str(directory))) == 1
    built = []
    build = downloads._build
    monkeypatch.setattr(downloads, "_build", lambda *args: built.append(1) or build(*args))
    open_downloads.cache_clear()
    assert len(open_downloads(str(directory))) == 1
    assert built == []
    download([url_of(host, 1)], directory, "webdataset", shard=1, **ORIGINALS)
    open_downloads.cache_clear()
    assert len(open_downloads(str(directory))) == 2
    assert built == [1]
