"""Pictures by name: found as they are called, and trouble of their place told as such."""

from __future__ import annotations

import errno
import io
import os
import tarfile
import unicodedata
import zipfile
from pathlib import Path

import fsspec
import pytest

from d2i import image_files, storage
from d2i.errors import DataError
from d2i.image_decode import ImageRejectedError
from d2i.image_files import check_root, read_image

MAX_BYTES = 1000
COMPOSED = "übung.jpg"
DECOMPOSED = unicodedata.normalize("NFD", COMPOSED)
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    image_files._index.cache_clear()
    return tmp_path / "cache"


def placed(folder: Path, names: dict[str, bytes], kind: str) -> str:
    """Put files into a folder, or a tar, and return it as the image root."""
    if kind == "folder":
        for name, data in names.items():
            (folder / "p" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "p" / name).write_bytes(data)
        return str(folder / "p")
    with tarfile.open(folder / "p.tar", "w") as tar:
        for name, data in names.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(folder / "p.tar")


def reason(root: str, path: str) -> str:
    with pytest.raises(ImageRejectedError) as caught:
        read_image(root, path, MAX_BYTES)
    return caught.value.reason


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_a_name_is_compared_as_text(tmp_path: Path, kind: str) -> None:
    names = ["photo[1].jpg", "12:00:00.png", "a:b.jpg", "50%.jpg", "p q#1.jpg", "sub/file::x.jpg"]
    root = placed(tmp_path, {name: name.encode() for name in names}, kind)
    for name in names:
        assert read_image(root, name, MAX_BYTES) == name.encode()
    for pattern in ("photo?1].jpg", "*.jpg", "photo1.jpg", "[a-z]*"):
        assert reason(root, pattern) == "missing_file"


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_a_name_is_found_in_the_other_unicode_form(tmp_path: Path, kind: str) -> None:
    """As macOS writes names, and as others do, also in folders; the very name comes first."""
    folder = "Fotos für mich"
    names = {
        COMPOSED: b"composed",
        f"a/{DECOMPOSED}": b"decomposed",
        f"{folder}/{DECOMPOSED}": b"mixed",
        f"b/{COMPOSED}": b"one",
        f"b/{DECOMPOSED}": b"other",
        # Two names of the same letters, and neither is as it is asked for.
        f"c/{COMPOSED}{DECOMPOSED}": b"one",
        f"c/{DECOMPOSED}{COMPOSED}": b"other",
    }
    root = placed(tmp_path, names, kind)
    for path, data in (
        *((COMPOSED, b"composed"), (f"a/{COMPOSED}", b"decomposed")),
        *((f"a/{DECOMPOSED}", b"decomposed"), (f"{folder}/{COMPOSED}", b"mixed")),
        (unicodedata.normalize("NFD", f"{folder}/{COMPOSED}"), b"mixed"),
        *((f"b/{COMPOSED}", b"one"), (f"b/{DECOMPOSED}", b"other")),
    ):
        assert read_image(root, path, MAX_BYTES) == data
    assert reason(root, f"c/{COMPOSED * 2}") == "ambiguous_file"
    assert reason(root, f"a/{COMPOSED}x") == "missing_file"
    assert reason(root, f"nowhere/{COMPOSED}") == "missing_file"


def test_no_name_leads_out_of_its_folder(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    root = placed(tmp_path, {"1.jpg": b"one"}, "folder")
    for path in ("../secret", "a/../../secret", f"ü/../../{tmp_path.name}/secret"):
        assert reason(root, path) == "read_error"
    for path in ("x::file://" + str(tmp_path / "secret"), "~/secret", "file:secret"):
        assert reason(root, path) == "missing_file"
    fsspec.filesystem("memory").pipe_file("/picture_files/1.jpg", b"one")
    assert reason("memory://picture_files", f"x::{tmp_path}/secret") == "read_error"


def test_a_pointer_of_git_lfs_is_no_picture_and_may_become_one(tmp_path: Path) -> None:
    root = placed(tmp_path, {"1.jpg": LFS}, "folder")
    assert reason(root, "1.jpg") == "lfs_pointer"


def wrong_roots(folder: Path) -> dict[str, tuple[str, str]]:
    """Give places that are none of pictures, and what is said of each."""
    (folder / "empty").mkdir()
    (folder / "empty" / ".DS_Store").write_bytes(b"")
    with zipfile.ZipFile(folder / "p.zip", "w") as archive:
        archive.writestr("1.jpg", b"one")
    with tarfile.open(folder / "p.tar.gz", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("1.jpg"))
    (folder / "gz.tar").write_bytes((folder / "p.tar.gz").read_bytes())
    (folder / "lfs.tar").write_bytes(LFS)
    (folder / "one.jpg").write_bytes(b"\xff\xd8\xff")
    (folder / "macos").mkdir()
    (folder / "macos" / "._p.tar").write_bytes(b"\0\5\x16\7")
    return {
        "nowhere": ("nowhere", "got nothing as the image root"),
        "unmounted": ("empty", "got an empty directory as the image root"),
        "zip": ("p.zip", "got a zip archive as the image root"),
        "compressed": ("p.tar.gz", "got gzip as the image root"),
        "a picture": ("one.jpg", "got JPEG as the image root"),
        "below a file": ("one.jpg/x", "got nothing as the image root"),
        "no tar": ("none.tar", "no such tar"),
        "no tars": ("macos/*.tar", "no such tar"),
        "compressed tar": ("gz.tar", "not an intact tar, but gzip"),
        "pointer": ("lfs.tar", "not an intact tar, but a Git LFS pointer"),
    }


def test_a_place_that_is_none_of_pictures_is_refused_and_no_picture_is_missing(
    tmp_path: Path,
) -> None:
    for name, message in wrong_roots(tmp_path).values():
        root = str(tmp_path / name)
        for look in (check_root, lambda root: read_image(root, "1.jpg", MAX_BYTES)):
            with pytest.raises(DataError, match=message) as caught:
                look(root)
            assert name.rpartition("*")[0] in str(caught.value)
            assert "corpus.image_root" in str(caught.value) or "decompress it" in str(caught.value)
    with pytest.raises(DataError, match="got nothing"):
        check_root("memory://picture_files_nowhere")


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_a_place_that_goes_away_is_no_missing_picture(tmp_path: Path, kind: str) -> None:
    root = placed(tmp_path, {"1.jpg": b"one", "2.jpg": b"two"}, kind)
    check_root(root)
    assert read_image(root, "1.jpg", MAX_BYTES) == b"one"
    Path(root).rename(tmp_path / "away")
    with pytest.raises(DataError, match="the tar is gone" if kind == "tar" else "got nothing"):
        read_image(root, "2.jpg", MAX_BYTES)
    if kind == "folder":
        # What is left of a disk that was taken away.
        Path(root).mkdir()
        with pytest.raises(DataError, match="an empty directory"):
            read_image(root, "2.jpg", MAX_BYTES)


def test_a_place_that_cannot_be_listed_is_told_with_its_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = placed(tmp_path, {"1.jpg": b"one"}, "folder")

    def stale(url: str) -> bool:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), url)

    monkeypatch.setattr(storage, "is_folder", stale)
    with pytest.raises(DataError, match=r"cannot be read \(Stale file handle\)"):
        read_image(root, "2.jpg", MAX_BYTES)


def test_an_index_that_cannot_be_kept_is_one_error_and_one_that_is_there_is_read(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = placed(tmp_path, {"1.jpg": b"one"}, "tar")
    # A folder below a file cannot be made, by whomever.
    (tmp_path / "home").write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    for look in (check_root, lambda root: read_image(root, "1.jpg", MAX_BYTES)):
        with pytest.raises(DataError, match=r"p\.tar; set XDG_CACHE_HOME to a writable"):
            look(root)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    check_root(root)
    image_files._index.cache_clear()
    monkeypatch.setattr(storage, "exclusive_lock", None)
    assert read_image(root, "1.jpg", MAX_BYTES) == b"one"
