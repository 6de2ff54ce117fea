"""Storage: files are complete or absent, on local paths and object stores alike."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from d2i.errors import ConfigError
from d2i.io import storage
from d2i.weights_resolve import resolve_weights


@pytest.fixture(params=["path", "file", "memory"])
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Return the URL of a directory that does not exist yet, on each kind of file system."""
    urls = {
        "path": str(tmp_path / "out"),
        "file": f"file://{tmp_path}/out",
        "memory": f"memory://{uuid.uuid4().hex}/out",
    }
    return urls[request.param]


def test_write_bytes_round_trip(directory: str) -> None:
    url = storage.join(directory, "deep", "a.bin")
    storage.write_bytes(url, b"one")
    storage.write_bytes(url, b"two")
    assert storage.read_bytes(url) == b"two"
    with storage.open_url(url, "r") as file:
        assert file.read() == "two"
    assert storage.list_names(directory) == ["deep"]
    assert storage.list_names(storage.join(directory, "deep")) == ["a.bin"]


def test_missing_file_is_not_listed_and_raises_on_read(directory: str) -> None:
    url = storage.join(directory, "a")
    assert storage.list_names(directory) == []
    assert not storage.exists(url)
    storage.remove(url)
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(url)


def test_list_names_follows_every_change(directory: str) -> None:
    for name in ("b", "a"):
        storage.write_bytes(storage.join(directory, name), b"")
    assert storage.list_names(directory) == ["a", "b"]
    storage.remove(storage.join(directory, "a"))
    assert storage.list_names(directory) == ["b"]
    assert storage.list_names(storage.join(directory, "b")) == []


def test_list_names_filters_by_prefix(directory: str) -> None:
    for name in ("ab", "a", "b", "deep/ab", "abc/x"):
        storage.write_bytes(storage.join(directory, name), b"")
    files = [name for name in storage.list_names(directory, "a") if name != "abc"]
    assert files == ["a", "ab"]
    assert storage.list_names(directory, "c") == storage.list_names(directory + "x", "a") == []


def test_publish_atomically_moves_and_fetch_file_copies(directory: str, tmp_path: Path) -> None:
    source, url = tmp_path / "source", storage.join(directory, "name")
    source.write_bytes(b"data")
    storage.publish_atomically(source, url)
    assert not source.exists()
    storage.fetch_file(url, tmp_path / "cache" / "copy")
    assert (tmp_path / "cache" / "copy").read_bytes() == storage.read_bytes(url) == b"data"
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["copy"]


def test_new_file_appears_only_on_exit(directory: str) -> None:
    for sync_name in (True, False):
        url = storage.join(directory, f"synced {sync_name}")
        with storage.new_file(url, sync_name=sync_name) as path:
            path.write_bytes(b"data")
            assert not storage.exists(url)
        assert storage.read_bytes(url) == b"data"
        with pytest.raises(RuntimeError), storage.new_file(url, sync_name=sync_name) as path:
            path.write_bytes(b"half")
            raise RuntimeError
        assert storage.read_bytes(url) == b"data"
    assert storage.list_names(directory) == ["synced False", "synced True"]


def test_publish_atomically_works_across_file_systems(tmp_path: Path) -> None:
    other = Path("/dev/shm")
    if not other.is_dir() or other.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("no second file system to move from")
    source = other / f"d2i-{uuid.uuid4().hex}"
    source.write_bytes(b"data")
    storage.publish_atomically(source, str(tmp_path / "name"))
    assert not source.exists()
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("name", b"data")]


def test_new_files_have_default_mode(tmp_path: Path) -> None:
    (tmp_path / "usual").write_bytes(b"")
    storage.write_bytes(str(tmp_path / "ours"), b"")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_local_paths_are_recognised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert storage.local_path("a/b") == Path("a/b")
    assert storage.local_path(f"file://{tmp_path}/x") == tmp_path / "x"
    assert storage.local_path("memory://a/b") is None
    assert storage.resolve("a/b/") == storage.resolve(f"file://{tmp_path}/a/b") == f"{tmp_path}/a/b"
    assert storage.resolve("s3://bucket/a/") == "s3://bucket/a"
    assert storage.join("/", "a") == "/a"
    assert storage.join("s3://b/", "/a/", "c") == "s3://b/a/c"


def test_failed_write_leaves_old_file(tmp_path: Path) -> None:
    url = str(tmp_path / "a")
    storage.write_bytes(url, b"old")
    with pytest.raises(RuntimeError), storage.scratch_file(str(tmp_path)) as scratch:
        scratch.write_bytes(b"half")
        raise RuntimeError
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a", b"old")]


def test_atomic_publish_leaves_no_listed_file_when_killed(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys\n"
        "from d2i.io import storage\n"
        "with storage.scratch_file(sys.argv[1]) as scratch:\n"
        "    scratch.write_bytes(b'half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    root = Path(__file__).resolve().parents[3]
    killed = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(root)},
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL
    assert storage.list_names(str(tmp_path)) == []
    assert storage.remove_temp_files(str(tmp_path)) == 1
    assert list(tmp_path.iterdir()) == []


class CloudError(Exception):
    """No subclass of `OSError`, like the errors of botocore, aiohttp and google.auth."""


class FailingStore(MemoryFileSystem):
    """A file system whose server is down or fails during reads."""

    protocol = "cloud"
    is_down = True

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.removeprefix("cloud://").lstrip("/")

    def info(self, path: str, **options: Any) -> Any:
        if self.is_down:
            raise CloudError("no such server")
        return super().info(path, **options)

    def ls(self, path: str, *_: Any, **__: Any) -> Any:
        raise CloudError(path)

    def put_file(self, *_: Any, **__: Any) -> Any:
        raise CloudError

    def rm_file(self, path: str) -> None:
        raise PermissionError(f"not yours: {path}")

    def _open(self, path: str, *arguments: Any, **options: Any) -> Any:
        file = super()._open(path, *arguments, **options)

        def read(_: int) -> bytes:
            raise CloudError("gone while reading")

        file.read = read
        return file


@pytest.fixture
def failing_url() -> Iterator[str]:
    fsspec.register_implementation("cloud", FailingStore, clobber=True)
    fsspec.filesystem("memory").pipe_file("/a", b"x")
    yield "cloud://a"
    fsspec.filesystem("memory").rm_file("/a")


@pytest.mark.parametrize(
    "work",
    [
        storage.exists,
        storage.list_names,
        storage.size_bytes,
        storage.remove,
        lambda url: storage.write_bytes(url, b""),
    ],
)
def test_object_store_error_names_url(
    failing_url: str, work: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError) as caught:
        work(failing_url)
    assert caught.value.filename == failing_url
    assert list(tmp_path.iterdir()) == []


def test_object_store_error_while_reading_names_url(
    failing_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FailingStore, "is_down", False)
    with (
        storage.open_url(failing_url) as file,
        pytest.raises(OSError, match="gone while") as caught,
    ):
        file.read()
    assert caught.value.filename == failing_url


@pytest.mark.parametrize("store", ["here", "memory"])
def test_append_bytes_appends_to_existing_file(store: str, tmp_path: Path) -> None:
    url = f"memory://appended{tmp_path}/a.txt" if store == "memory" else f"{tmp_path}/in/a.txt"
    for data in (b"one\n", b"two\n"):
        storage.append_bytes(url, data)
    assert storage.read_bytes(url) == b"one\ntwo\n"


def test_remove_directory_removes_only_its_contents(tmp_path: Path) -> None:
    for directory in (str(tmp_path / "gone"), f"memory://gone{tmp_path}"):
        storage.write_bytes(f"{directory}/in/a", b"1")
        storage.write_bytes(f"{directory}-not", b"1")
        storage.remove_directory(directory)
        storage.remove_directory(directory)
        assert not storage.exists(directory)
        assert storage.exists(f"{directory}-not")


def test_list_versions_detects_changed_files(directory: str) -> None:
    assert storage.list_versions(directory) == {}
    for name in ("a.png", "deep/b.png"):
        storage.write_bytes(storage.join(directory, name), name.encode())
    before = storage.list_versions(directory)
    assert sorted(before) == ["a.png", "deep/b.png"]
    assert storage.list_versions(directory) == before
    storage.write_bytes(storage.join(directory, "a.png"), b"longer than before")
    after = storage.list_versions(directory)
    assert after["deep/b.png"] == before["deep/b.png"]
    assert after["a.png"] != before["a.png"]
    assert list(storage.list_versions(storage.join(directory, "a.png"))) == [""]


def test_weights_url_is_cached_once_per_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    directory = f"memory://weights{tmp_path}/model"
    for name in ("config.json", "model.safetensors"):
        storage.write_bytes(f"{directory}/{name}", name.encode())
    copy = Path(resolve_weights(directory))
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == {
        "config.json": b"config.json",
        "model.safetensors": b"model.safetensors",
    }
    file = Path(resolve_weights(f"{directory}/model.safetensors"))
    assert file.read_bytes() == b"model.safetensors"
    before = file.stat().st_mtime_ns
    assert resolve_weights(f"{directory}/model.safetensors") == str(file)
    assert file.stat().st_mtime_ns == before
    storage.write_bytes(f"{directory}/model.safetensors", b"newer")
    assert Path(resolve_weights(f"{directory}/model.safetensors")).read_bytes() == b"newer"
    assert (Path(resolve_weights(directory)) / "model.safetensors").read_bytes() == b"newer"
    with pytest.raises(FileNotFoundError):
        resolve_weights(f"{directory}/other.safetensors")


NO_CHMOD = """
#include <errno.h>
#include <sys/types.h>
int chmod(const char *p, mode_t m) { errno = EOPNOTSUPP; return -1; }
int fchmodat(int d, const char *p, mode_t m, int f) { errno = EOPNOTSUPP; return -1; }
"""


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs a C compiler")
def test_write_succeeds_without_chmod_support(tmp_path: Path) -> None:
    (tmp_path / "no.c").write_text(NO_CHMOD)
    library = tmp_path / "no.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, tmp_path / "no.c"], check=True)
    program = "import sys; from d2i.io import storage; storage.write_bytes(sys.argv[1], b'whole')"
    command = [sys.executable, "-c", program, str(tmp_path / "out" / "a")]
    subprocess.run(command, check=True, env={**os.environ, "LD_PRELOAD": str(library)})
    assert (tmp_path / "out" / "a").read_bytes() == b"whole"


@pytest.mark.parametrize(
    ("code", "on", "is_ignored"),
    [
        *((code, "folder", True) for code in (errno.EINVAL, errno.EACCES, errno.ENOTSUP)),
        *((code, "file", True) for code in (errno.EINVAL, errno.ENOSYS)),
        *((code, on, False) for code in (errno.EIO, errno.ENOSPC) for on in ("file", "folder")),
        (errno.EACCES, "file", False),
    ],
)
def test_unsupported_fsync_is_ignored_but_io_errors_are_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, on: str, *, is_ignored: bool
) -> None:
    def fail_fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode) == (on == "folder"):
            raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail_fsync)
    url = str(tmp_path / "a")
    if is_ignored:
        storage.write_bytes(url, b"whole")
        assert storage.read_bytes(url) == b"whole"
        return
    with pytest.raises(OSError, match=os.strerror(code)) as caught:
        storage.write_bytes(url, b"whole")
    assert str(caught.value.filename).startswith(str(tmp_path))


def test_write_error_names_file(tmp_path: Path) -> None:
    """Files are limited to 8 bytes; the error of the system names no file."""
    program = f"""
import resource, sys
from d2i import cli
from d2i.io import storage
resource.setrlimit(resource.RLIMIT_FSIZE, (8, 8))
for write in (storage.write_bytes, storage.append_bytes):
    try:
        write({str(tmp_path / "a")!r}, b"0123456789" * 1000)
    except OSError as err:
        print(err.strerror, err.filename)
from d2i.cli.app import _file_problem, _is_storage_error
err = OSError(27, "File too large")
print(_is_storage_error(err), _file_problem(err))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    *named, temporary = done.stdout.splitlines()
    assert named == [f"File too large {tmp_path}/a"] * 2
    assert "True the temporary directory /" in temporary


@pytest.mark.parametrize("name", ["a::b", "data:2024", "x/a::b", "::", "file:x", "http:x"])
def test_name_with_colons_is_local_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for directory in (name, f"{tmp_path}/y/{name}"):
        url = storage.join(directory, "file")
        assert storage.local_path(directory) is not None
        storage.write_bytes(url, b"1")
        assert storage.exists(url)
        assert storage.list_names(directory) == ["file"]
        assert storage.read_range(url, 0, 1) == storage.read_bytes(url) == b"1"
        storage.remove(url)
        assert not storage.exists(url)
    assert {path.name for path in tmp_path.iterdir()} == {name.split("/")[0], "y"}


@pytest.mark.parametrize("url", ["simplecache::file:///a", "simplecache::s3://b/a", "s3://b::c"])
def test_chained_url_is_not_local_path(url: str) -> None:
    assert storage.local_path(url) is None


def test_cache_directory_without_home_is_private(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def nobody(_number: int) -> Any:
        raise KeyError

    monkeypatch.setattr("pwd.getpwuid", nobody)
    directory = tmp_path / f"d2i-user-{os.getuid()}"
    assert storage.cache_directory("x").is_relative_to(directory)
    assert directory.stat().st_mode & 0o777 == 0o700
    directory.rmdir()
    (tmp_path / "elsewhere").mkdir()
    directory.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="set XDG_CACHE_HOME to one"):
        storage.cache_directory("x")
