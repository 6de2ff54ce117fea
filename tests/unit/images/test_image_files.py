"""Image files by name, and errors of the image root that are not missing images."""

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

from d2i.errors import DataError
from d2i.images import image_files
from d2i.images.decode import ImageRejectedError
from d2i.images.image_files import check_root, read_image
from d2i.io import storage

MAX_BYTES = 1000
COMPOSED = "übung.jpg"
DECOMPOSED = unicodedata.normalize("NFD", COMPOSED)
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    image_files._index.cache_clear()
    return tmp_path / "cache"


def write_root(directory: Path, names: dict[str, bytes], kind: str) -> str:
    """Write files into a directory or a tar, and return it as the image root."""
    if kind == "folder":
        for name, data in names.items():
            (directory / "p" / name).parent.mkdir(parents=True, exist_ok=True)
            (directory / "p" / name).write_bytes(data)
        return str(directory / "p")
    with tarfile.open(directory / "p.tar", "w") as tar:
        for name, data in names.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(directory / "p.tar")


def reason(root: str, path: str) -> str:
    with pytest.raises(ImageRejectedError) as caught:
        read_image(root, path, MAX_BYTES)
    return caught.value.reason


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_image_name_is_no_glob_pattern(tmp_path: Path, kind: str) -> None:
    names = ["photo[1].jpg", "12:00:00.png", "a:b.jpg", "50%.jpg", "p q#1.jpg", "sub/file::x.jpg"]
    root = write_root(tmp_path, {name: name.encode() for name in names}, kind)
    for name in names:
        assert read_image(root, name, MAX_BYTES) == name.encode()
    for pattern in ("photo?1].jpg", "*.jpg", "photo1.jpg", "[a-z]*"):
        assert reason(root, pattern) == "missing_file"


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_image_name_is_found_in_other_unicode_form(tmp_path: Path, kind: str) -> None:
    """Composed or decomposed (macOS), also in directory names; the exact name comes first."""
    directory = "Fotos für mich"
    names = {
        COMPOSED: b"composed",
        f"a/{DECOMPOSED}": b"decomposed",
        f"{directory}/{DECOMPOSED}": b"mixed",
        f"b/{COMPOSED}": b"one",
        f"b/{DECOMPOSED}": b"other",
        # Two names with the same letters, neither of them the exact one.
        f"c/{COMPOSED}{DECOMPOSED}": b"one",
        f"c/{DECOMPOSED}{COMPOSED}": b"other",
    }
    root = write_root(tmp_path, names, kind)
    for path, data in (
        *((COMPOSED, b"composed"), (f"a/{COMPOSED}", b"decomposed")),
        *((f"a/{DECOMPOSED}", b"decomposed"), (f"{directory}/{COMPOSED}", b"mixed")),
        (unicodedata.normalize("NFD", f"{directory}/{COMPOSED}"), b"mixed"),
        *((f"b/{COMPOSED}", b"one"), (f"b/{DECOMPOSED}", b"other")),
    ):
        assert read_image(root, path, MAX_BYTES) == data
    assert reason(root, f"c/{COMPOSED * 2}") == "ambiguous_file"
    assert reason(root, f"a/{COMPOSED}x") == "missing_file"
    assert reason(root, f"nowhere/{COMPOSED}") == "missing_file"


def test_image_name_cannot_escape_image_root(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    root = write_root(tmp_path, {"1.jpg": b"one"}, "folder")
    for path in ("../secret", "a/../../secret", f"ü/../../{tmp_path.name}/secret"):
        assert reason(root, path) == "read_error"
    for path in ("x::file://" + str(tmp_path / "secret"), "~/secret", "file:secret"):
        assert reason(root, path) == "missing_file"
    fsspec.filesystem("memory").pipe_file("/picture_files/1.jpg", b"one")
    assert reason("memory://picture_files", f"x::{tmp_path}/secret") == "read_error"


def test_git_lfs_pointer_has_its_own_reason(tmp_path: Path) -> None:
    root = write_root(tmp_path, {"1.jpg": LFS}, "folder")
    assert reason(root, "1.jpg") == "lfs_pointer"


def wrong_roots(directory: Path) -> dict[str, tuple[str, str]]:
    """Return invalid image roots, with the error message of each."""
    (directory / "empty").mkdir()
    (directory / "empty" / ".DS_Store").write_bytes(b"")
    with zipfile.ZipFile(directory / "p.zip", "w") as archive:
        archive.writestr("1.jpg", b"one")
    with tarfile.open(directory / "p.tar.gz", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("1.jpg"))
    (directory / "gz.tar").write_bytes((directory / "p.tar.gz").read_bytes())
    (directory / "lfs.tar").write_bytes(LFS)
    (directory / "one.jpg").write_bytes(b"\xff\xd8\xff")
    (directory / "macos").mkdir()
    (directory / "macos" / "._p.tar").write_bytes(b"\0\5\x16\7")
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


def test_invalid_image_root_raises_instead_of_missing_file(
    tmp_path: Path,
) -> None:
    for name, message in wrong_roots(tmp_path).values():
        root = str(tmp_path / name)
        for check in (check_root, lambda root: read_image(root, "1.jpg", MAX_BYTES)):
            with pytest.raises(DataError, match=message) as caught:
                check(root)
            assert name.rpartition("*")[0] in str(caught.value)
            assert "corpus.image_root" in str(caught.value) or "decompress it" in str(caught.value)
    with pytest.raises(DataError, match="got nothing"):
        check_root("memory://picture_files_nowhere")


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_vanished_image_root_raises_instead_of_missing_file(tmp_path: Path, kind: str) -> None:
    root = write_root(tmp_path, {"1.jpg": b"one", "2.jpg": b"two"}, kind)
    check_root(root)
    assert read_image(root, "1.jpg", MAX_BYTES) == b"one"
    Path(root).rename(tmp_path / "away")
    with pytest.raises(DataError, match="the tar is gone" if kind == "tar" else "got nothing"):
        read_image(root, "2.jpg", MAX_BYTES)
    if kind == "folder":
        # The empty mount point of an unmounted disk.
        Path(root).mkdir()
        with pytest.raises(DataError, match="an empty directory"):
            read_image(root, "2.jpg", MAX_BYTES)


def test_unlistable_image_root_error_names_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_root(tmp_path, {"1.jpg": b"one"}, "folder")

    def stale(url: str) -> bool:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), url)

    monkeypatch.setattr(storage, "is_directory", stale)
    with pytest.raises(DataError, match=r"cannot be read \(Stale file handle\)"):
        read_image(root, "2.jpg", MAX_BYTES)


def test_unwritable_tar_index_raises_and_cached_one_is_read(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_root(tmp_path, {"1.jpg": b"one"}, "tar")
    # A directory below a file cannot be made, even by root.
    (tmp_path / "home").write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    for check in (check_root, lambda root: read_image(root, "1.jpg", MAX_BYTES)):
        with pytest.raises(DataError, match=r"p\.tar; set XDG_CACHE_HOME to a writable"):
            check(root)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    check_root(root)
    image_files._index.cache_clear()
    monkeypatch.setattr(storage, "exclusive_lock", None)
    assert read_image(root, "1.jpg", MAX_BYTES) == b"one"
