"""Images in tars: found by name, read whole; links and unsafe names are not followed."""

from __future__ import annotations

import io
import tarfile
import uuid
from collections.abc import Iterable
from pathlib import Path

import fsspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2i.errors import DataError
from d2i.images import image_files
from d2i.images.decode import ImageRejectedError
from d2i.images.image_files import read_image
from d2i.images.tar_index import open_index

MAX_BYTES = 10_000


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    image_files._index.cache_clear()
    return tmp_path / "cache"


def make_tar(
    members: Iterable[tuple[str, bytes | bytes]],
    form: int = tarfile.PAX_FORMAT,
    mode: str = "w",
) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode, format=form) as tar:  # type: ignore[call-overload]
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def reason(root: str, path: str) -> str:
    with pytest.raises(ImageRejectedError) as caught:
        read_image(root, path, MAX_BYTES)
    return caught.value.reason


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tar_member_is_found_by_name_or_end_of_path(tmp_path: Path, form: int) -> None:
    long = "/".join(["x" * 60] * 2) + "/3.jpg"
    members = [("./a/b/1.jpg", b"one"), ("2.jpg", b""), (long, b"three")]
    (tmp_path / "x.tar").write_bytes(make_tar(members, form))
    root = str(tmp_path / "x.tar")
    for path, data in (
        *(("a/b/1.jpg", b"one"), ("b/1.jpg", b"one"), ("1.jpg", b"one")),
        *(("2.jpg", b""), (long, b"three"), ("3.jpg", b"three")),
    ):
        assert read_image(root, path, MAX_BYTES) == data
    assert reason(root, "c/1.jpg") == "missing_file"
    assert reason(root, "a/b") == "missing_file"


def test_glob_of_tars_on_object_store_is_one_image_root() -> None:
    directory = f"memory://{uuid.uuid4().hex}"
    for number in range(3):
        data = make_tar([(f"{number}-{n}.jpg", b"%d %d" % (number, n)) for n in range(5)])
        fsspec.filesystem("memory").pipe_file(f"{directory[8:]}/{number}.tar", data)
    fsspec.filesystem("memory").pipe_file(f"{directory[8:]}/other.txt", b"no tar")
    assert read_image(f"{directory}/*.tar", "2-4.jpg", MAX_BYTES) == b"2 4"
    assert read_image(f"{directory}/1.tar", "1-0.jpg", MAX_BYTES) == b"1 0"
    with pytest.raises(DataError, match="no such tar"):
        open_index(f"{directory}/none-*.tar")


def test_tar_index_is_cached_and_rebuilt_for_changed_tar(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(make_tar([("1.jpg", b"one")]))
    for _ in range(2):
        assert len(open_index(str(path))) == 1
    assert len(list(cache.rglob("*.arrow"))) == 1
    path.write_bytes(make_tar([("0.jpg", b"zero"), ("1.jpg", b"two")]))
    assert read_image(str(path), "1.jpg", MAX_BYTES) == b"two"


def test_ambiguous_member_name_with_other_content_is_rejected(tmp_path: Path) -> None:
    members = [("train/1.jpg", b"one"), ("test/1.jpg", b"one")]
    members += [("train/2.jpg", b"two"), ("test/2.jpg", b"other"), ("2.jpg", b"plain")]
    members += [("train/3.jpg", b"three"), ("test/3.jpg", b"other")]
    (tmp_path / "x.tar").write_bytes(make_tar(members))
    root = str(tmp_path / "x.tar")
    assert read_image(root, "1.jpg", MAX_BYTES) == b"one"
    assert read_image(root, "2.jpg", MAX_BYTES) == b"plain"
    assert read_image(root, "test/2.jpg", MAX_BYTES) == b"other"
    assert reason(root, "3.jpg") == "ambiguous_file"


def test_links_devices_and_unsafe_names_are_not_followed(tmp_path: Path) -> None:
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(b"secret")
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, kind, target in (
            ("link.jpg", tarfile.SYMTYPE, str(secret)),
            ("hard.jpg", tarfile.LNKTYPE, "../secret.jpg"),
            ("device.jpg", tarfile.CHRTYPE, ""),
            ("pipe.jpg", tarfile.FIFOTYPE, ""),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            tar.addfile(info)
        for name in ("../up.jpg", "/abs.jpg", "a/../in.jpg"):
            tar.addfile(tarfile.TarInfo(name))
    root = str(tmp_path / "x.tar")
    for name in ("link.jpg", "hard.jpg", "device.jpg", "pipe.jpg"):
        assert reason(root, name) == "refused_member"
    for name in ("up.jpg", "abs.jpg", "in.jpg", "../up.jpg", "/abs.jpg"):
        assert reason(root, name) == "missing_file"


def test_oversized_member_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(make_tar([("1.jpg", bytes(MAX_BYTES + 1))]))
    assert reason(str(tmp_path / "x.tar"), "1.jpg") == "too_many_bytes"


@given(st.integers(1, 5 * 10240 - 1))
def test_truncated_tar_raises(length: int) -> None:
    whole = make_tar([(f"{n}.jpg", bytes([n]) * 700) for n in range(20)])
    end = whole.rstrip(b"\0")
    # Of the zeros that pad the last record, the first block alone ends an archive.
    length = min(length, (len(end) + 511) // 512 * 512)
    name = f"memory://{uuid.uuid4().hex}.tar"
    fsspec.filesystem("memory").pipe_file(name, whole[:length])
    with pytest.raises(DataError, match="not an intact tar"):
        open_index(name)


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2"])
def test_compressed_tar_raises(tmp_path: Path, mode: str) -> None:
    (tmp_path / "x.tar").write_bytes(make_tar([("1.jpg", b"one")], mode=mode))
    with pytest.raises(DataError, match="not compressed"):
        open_index(str(tmp_path / "x.tar"))


def test_oversized_long_name_header_raises(tmp_path: Path) -> None:
    info = tarfile.TarInfo("long")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 7 << 30
    (tmp_path / "x.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(2048))
    with pytest.raises(DataError, match="header of"):
        open_index(str(tmp_path / "x.tar"))


def test_tar_without_files_raises(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(make_tar([]))
    with pytest.raises(DataError, match="contain no files"):
        open_index(str(tmp_path / "x.tar"))
