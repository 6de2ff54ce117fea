"""Files by URL: the only module that accesses a file system through fsspec.

A URL is a plain path, `file://…`, or anything fsspec knows (`s3://`, `gs://`, `memory://`).
Files are published atomically: they appear under their final name complete, or not at all. Must
not import any part of d2i but `errors`, `lease` and `prefetch`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import io
import os
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import IO, Any, Literal, cast

from d2i.errors import ConfigError, D2IError
from d2i.io.lease import DIRECTORY_NAME, hold_lease
from d2i.io.prefetch import prefetch_map

TEMPORARY_SUFFIX = ".d2i-tmp"
_LOCK_WAIT_S = 15.0
_BUFFER_BYTES = 1 << 18
_NUM_READERS = 32
# Errors of file systems without locks: Lustre without `-o flock`, several mounts in user space.
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)
# Errors of those that cannot fsync a file, or open and fsync a directory: CIFS, several in user
# space.
_NO_SYNC = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)
_NO_DIRECTORY_SYNC = (*_NO_SYNC, errno.EACCES, errno.EPERM, errno.EISDIR, errno.EBADF)
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "oss", "oci"}
"""fsspec's names of file systems whose paths begin with a bucket."""


def join(url: str, *parts: str) -> str:
    """Append path parts to a URL with single slashes between them."""
    return "/".join([url.rstrip("/"), *(part.strip("/") for part in parts)])


def resolve(url: str) -> str:
    """Return an absolute plain path for a local URL, and any other URL without a trailing slash."""
    path = local_path(url)
    return url.rstrip("/") if path is None else str(path.absolute())


def absolute(place: str) -> str:
    """Return an existing local path as an absolute one, a URL or a hub's name unchanged."""
    return resolve(place) if Path(os.path.expanduser(place)).exists() else place  # noqa: PTH111


def local_path(url: str) -> Path | None:
    """Return the path of a local URL, or None if the URL names another file system."""
    name = _local_name(url)
    return None if name is None else Path(name)


def names_host(url: str) -> bool:
    """Return whether reading a URL contacts a host that the URL itself names, as `http://` does.

    A path does not, nor does a bucket: its server is a setting of the user's own.
    """
    if local_path(url) is not None:
        return False
    return "::" in url or url.partition("://")[0] not in _OBJECT_STORES | {"memory"}


def exists(url: str) -> bool:
    """Return whether a file or a directory exists."""
    with _errors_of(url):
        fs, path = _split(url)
        # The `exists` of many file systems takes a server that is down for an absent file.
        try:
            fs.info(path)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True


def list_names(url: str, prefix: str = "") -> list[str]:
    """List the names of files and directories in a directory, sorted; empty if there is none.

    Files still being written, and those a killed process left behind, are not listed, nor what
    macOS leaves beside other files (`._NAME`, `.DS_Store`). With a `prefix`, only names that begin
    with it: object stores then need not list all the others, and list files only.
    """
    with _errors_of(url):
        fs, path = _split(url)
        own = path.rstrip("/")
        try:
            if prefix and local_path(url) is None:
                # It also finds files in subdirectories.
                depth = own.count("/") + 1
                entries = [e for e in fs.find(path, prefix=prefix) if e.count("/") == depth]
            else:
                entries = fs.ls(path, detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
    # Object stores list a directory's own placeholder, and fsspec lists a file as itself.
    inside = [entry.rstrip("/") for entry in entries if entry.rstrip("/") != own]
    names = {entry.rpartition("/")[2] for entry in inside}
    return sorted(name for name in names if name.startswith(prefix) and not _is_passed_over(name))


def _is_passed_over(name: str) -> bool:
    return name.endswith(TEMPORARY_SUFFIX) or name.startswith("._") or name == ".DS_Store"


def is_directory(url: str) -> bool:
    """Return whether there is a directory, and not a file."""
    with _errors_of(url):
        fs, path = _split(url)
        try:
            return bool(fs.info(path)["type"] == "directory")
        except (FileNotFoundError, NotADirectoryError):
            return False


def size_bytes(url: str) -> int:
    """Return the length of a file."""
    with _errors_of(url):
        fs, path = _split(url)
        return int(fs.size(path))


def read_head(url: str, num_bytes: int) -> bytes:
    """Read the first bytes of a file, or all of it if it is shorter.

    Raises:
        FileNotFoundError: If there is no such file.
        OSError: If it cannot be read, or is not a regular file.
    """
    local = _local_name(url)
    if local is not None:
        return read_local_head(local, num_bytes)
    with open_url(url) as file:
        return cast("bytes", file.read(num_bytes))


def read_local_head(path: str, num_bytes: int) -> bytes:
    """Read the first bytes of a local file as `read_head` does; `path` is not parsed as a URL."""
    # O_NONBLOCK: opening a pipe does not wait.
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:  # noqa: PTH123
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", path)
        return file.read(min(num_bytes, status.st_size))


def version(url: str) -> str:
    """Return a value that changes when a file does: a hash of its length, time, or ETag."""
    with _errors_of(url):
        fs, path = _split(url)
        return str(fs.ukey(path))


def list_versions(url: str) -> dict[str, str]:
    """Return a value that changes when a file does, for a file or all below a directory, by name.

    Takes one listing; empty if nothing is there.
    """
    with _errors_of(url):
        fs, path = _split(url)
        try:
            found = fs.find(path, detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return {}
    own = path.rstrip("/")
    return {
        name.removeprefix(own).lstrip("/"): hashlib.sha256(str(info).encode()).hexdigest()
        for name, info in found.items()
    }


def read_range(url: str, offset: int, size_bytes: int) -> bytes:
    """Read a part of a file; it is shorter if the file ends before.

    Raises:
        FileNotFoundError: If there is no such file.
        OSError: If it cannot be read.
    """
    if not size_bytes:
        return b""
    with _errors_of(url):
        fs, path = _split(url)
        return bytes(fs.cat_file(path, start=offset, end=offset + size_bytes))


def open_url(url: str, mode: Literal["rb", "r"] = "rb") -> IO[Any]:
    """Open a file for reading, as bytes or as UTF-8 text.

    Raises:
        FileNotFoundError: If there is no such file.
        OSError: If it cannot be read, also later while it is; if it is not a regular file: opening
            a pipe would wait.
    """
    local = local_path(url)
    if local is not None and local.exists() and not local.is_file():
        raise OSError(errno.EINVAL, "not a regular file", str(local))
    with _errors_of(url):
        fs, path = _split(url)
        file = fs.open(path, "rb")
    if local is None:
        file = io.BufferedReader(_RemoteFile(file, url), _BUFFER_BYTES)
    return cast("IO[Any]", file if mode == "rb" else io.TextIOWrapper(file, encoding="utf-8"))


def read_bytes(url: str) -> bytes:
    """Read a whole file.

    Raises:
        FileNotFoundError: If there is no such file.
    """
    with open_url(url) as file:
        return cast("bytes", file.read())


def read_each(urls: Iterable[str]) -> Iterator[bytes]:
    """Yield the content of many small files, in order.

    Reads several at a time, as remote reads are mostly waiting, and holds few in memory.

    Raises:
        FileNotFoundError: If one is not there.
    """
    return prefetch_map(read_bytes, urls, _NUM_READERS)


def fetch_file(url: str, path: Path) -> None:
    """Copy a file to a local path, published atomically."""
    with errors_with_path(path), scratch_file(str(path.parent)) as scratch:
        download(url, scratch)
        publish_atomically(scratch, str(path))


def download(url: str, path: Path) -> None:
    """Copy a file to a local path; not atomic: it may be partial until this returns."""
    with _errors_of(url):
        fs, source = _split(url)
        fs.get_file(source, str(path))


def write_bytes(url: str, data: bytes) -> None:
    """Write a whole file, published atomically; its directories are created."""
    with new_file(url) as path:
        path.write_bytes(data)


@contextlib.contextmanager
def new_file(url: str, *, sync_name: bool = True) -> Iterator[Path]:
    """Yield a local file to fill, which is then published by `publish_atomically`."""
    target = local_path(url)
    with (
        errors_with_path(target or Path(tempfile.gettempdir())),
        scratch_file(url if target is None else str(target.parent)) as scratch,
    ):
        yield scratch
        publish_atomically(scratch, url, sync_name=sync_name)


def is_disk_full(error: OSError) -> bool:
    """Return whether an error is of a full disk, a used-up quota, or a file too large."""
    return error.errno in _DISK_FULL


@contextlib.contextmanager
def errors_with_path(path: Path) -> Iterator[None]:
    """Add the name of the file being written to an error of a full disk.

    The system does not give it, as the error is about an open file.
    """
    try:
        yield
    except OSError as err:
        if is_disk_full(err) and err.filename is None:
            err.filename = str(path)
        raise


def _read_umask() -> int:
    umask = os.umask(0o022)
    os.umask(umask)
    return umask


# Read once, while there is only one thread: the umask can only be read by changing it.
_UMASK = _read_umask()


def publish_atomically(path: Path, url: str, *, sync_name: bool = True) -> None:
    """Move a finished local file to its URL, where it appears complete or not at all.

    A local target is reached by fsync and rename (through a copy beside it if the two are on
    different file systems), any other by a plain put, which object stores make visible at once.
    The local file is gone afterwards. The target has the permissions of any new file.

    Without `sync_name` a power failure may undo the move until the next file is published there
    with it. Use this for many files that count only once that next one is there, as each fsync of
    the directory would wait for the disk.
    """
    target = local_path(url)
    if target is None:
        _upload(path, url)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    if path.stat().st_dev != target.parent.stat().st_dev:
        path = _copy_beside(path, target)
    # Libraries may have replaced the file by one that only its owner can read. A file system
    # without permissions treats all files alike.
    with contextlib.suppress(OSError):
        path.chmod(0o666 & ~_UMASK)
    sync(path)
    path.replace(target)
    if sync_name:
        sync(target.parent)


@contextlib.contextmanager
def scratch_file(directory_url: str) -> Iterator[Path]:
    """Yield a new, empty local file to fill and then `publish_atomically` into a directory.

    It is in the directory itself if that is local, so that publishing is a rename, and is removed
    on exit if it is still there.
    """
    directory = local_path(directory_url) or Path(tempfile.gettempdir())
    directory.mkdir(parents=True, exist_ok=True)
    path = _temporary_in(directory)
    path.touch(exist_ok=False)
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def cache_directory(url: str) -> Path:
    """Return the directory of the user's cache for local copies of a URL's files."""
    root = os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")  # noqa: PTH111
    # A container may run under a user id that has no home.
    directory = private_cache_directory() if root.startswith("~") else Path(root)
    return directory / "d2i" / hashlib.sha256(url.encode()).hexdigest()[:16]


def private_cache_directory() -> Path:
    """Return a directory of this user's own for temporary files, created if absent.

    Raises:
        ConfigError: If its name is taken by another user.
    """
    directory = Path(tempfile.gettempdir()) / f"d2i-user-{os.getuid()}"
    directory.mkdir(mode=0o700, exist_ok=True)
    if directory.is_symlink() or directory.stat().st_uid != os.getuid():
        raise ConfigError(
            f"{directory} belongs to another user; expected a directory for d2i's cache, as this "
            "user has no home; set XDG_CACHE_HOME to one"
        )
    return directory


def append_bytes(url: str, data: bytes) -> None:
    """Append to a file; if its file system cannot, rewrite the whole file."""
    local = local_path(url)
    if local is None:
        write_bytes(url, (read_bytes(url) if exists(url) else b"") + data)
        return
    local.parent.mkdir(parents=True, exist_ok=True)
    with errors_with_path(local), local.open("ab") as file:
        file.write(data)


def local_copy(url: str) -> Path:
    """Return a local path of a file: its own, or that of a copy in the user's cache.

    A copy belongs to one version of the file, and is fetched once.

    Raises:
        FileNotFoundError: If there is no such file.
        OSError: If it cannot be read, or not be stored.
    """
    local = local_path(url)
    if local is not None:
        return local
    path = cache_directory(f"{url} {version(url)}") / url.rpartition("/")[2]
    if not path.is_file():
        fetch_file(url, path)
    return path


def local_copies(url: str) -> Path:
    """Return a local path of a file, or of a directory that holds only files; as `local_copy`."""
    local = local_path(url)
    names = list_names(url) if local is None else []
    if not names or names == [url.rpartition("/")[2]]:
        return local_copy(url)
    copied = {name: f"{join(url, name)} {version(join(url, name))}" for name in names}
    directory = cache_directory(" ".join(copied.values()))
    for name in names:
        if not (directory / name).is_file():
            fetch_file(join(url, name), directory / name)
    return directory


def make_directory(url: str) -> None:
    """Create a local directory that survives a power failure; do nothing for a remote one."""
    local = local_path(url)
    if local is not None:
        local.mkdir(parents=True, exist_ok=True)
        sync(local.parent)


def remove_directory(url: str) -> None:
    """Remove a directory and everything in it; do nothing if there is none."""
    with _errors_of(url), contextlib.suppress(FileNotFoundError):
        fs, path = _split(url)
        fs.rm(path, recursive=True)


def remove(url: str) -> None:
    """Remove a file; do nothing if there is none."""
    with _errors_of(url), contextlib.suppress(FileNotFoundError):
        fs, path = _split(url)
        fs.rm_file(path)


def remove_temp_files(url: str) -> int:
    """Remove the temporary files that killed processes left in a local directory.

    Call it only while nothing else writes there.

    Returns:
        The number of files removed.
    """
    directory = local_path(url)
    leftovers = [] if directory is None else list(directory.glob(f".*{TEMPORARY_SUFFIX}"))
    for path in leftovers:
        path.unlink(missing_ok=True)
    return len(leftovers)


@contextlib.contextmanager
def exclusive_lock(url: str, *, wait_s: float = _LOCK_WAIT_S) -> Iterator[None]:
    """Lock a directory for one command, if its file system can; an object store by a lease.

    Args:
        url: The directory.
        wait_s: How long to wait for another holder; a killed command may leave processes that take
            a moment to end.

    Raises:
        ConfigError: If another command keeps the lock, or there is no such bucket.
    """
    directory = local_path(url)
    if directory is None:
        with _errors_of(url):
            fs, path = _split(url)
            has_buckets = _has_buckets(fs)
            if has_buckets:
                _check_bucket(fs, path, url)
        with _leased(fs, path, url, wait_s) if has_buckets else contextlib.nullcontext():
            yield
        return
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / DIRECTORY_NAME).open("w") as lock:
        _take(lock, url, wait_s)
        yield


@contextlib.contextmanager
def _leased(fs: Any, path: str, url: str, wait_s: float) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        with _errors_of(url):
            stack.enter_context(hold_lease(fs, path, url, wait_s))
        yield


def _take(lock: IO[str], url: str, wait_s: float) -> None:
    deadline = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as err:
            # CIFS raises the latter.
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"{url}: locked by another d2i process; wait for it to finish, or use another "
                    "directory"
                ) from err
            time.sleep(0.1)
        except OSError as err:
            if err.errno not in _NO_LOCKS:
                raise
            return
        else:
            return


def _local_name(url: str) -> str | None:
    """Return `local_path` as text, at a third of the cost: reading an image takes one call."""
    scheme, separator, rest = url.partition("://")
    if (separator and scheme not in {"file", "local"}) or ("::" in url and _is_chain(url)):
        return None
    return os.path.expanduser(rest if separator else url)  # noqa: PTH111


def _is_chain(url: str) -> bool:
    """Return whether `::` joins file systems, as in `simplecache::s3://…`, and is not in a name."""
    import fsspec

    first = url.partition("::")[0]
    return "://" in first or first in fsspec.available_protocols()


def _split(url: str) -> tuple[Any, str]:
    """Split a URL into fsspec's file system and the path on it.

    fsspec is imported here because that takes a sixth of a second, too long for `d2i --help`.
    """
    import fsspec

    local = _local_name(url)
    if local is not None:
        # fsspec would not take `data:2024` or `a::b` for a path.
        return fsspec.filesystem("file"), os.path.abspath(local)  # noqa: PTH100
    try:
        fs, path = fsspec.core.url_to_fs(url)
    except ImportError as err:
        raise ConfigError(f"{url}: {err}; install it with pip, in the environment of d2i") from err
    except ValueError as err:
        raise ConfigError(
            f"{url}: {err}; expected a path, or a URL of a file system that fsspec knows"
        ) from err
    if "s3" in _protocols(fs):
        _retry_unavailable_s3()
    # Its cached listings are stale as soon as another process writes.
    fs.invalidate_cache()
    return fs, path


@cache
def _retry_unavailable_s3() -> None:
    """Let s3fs retry a server that cannot be reached or answers 5xx, as it does a lost connection.

    Otherwise botocore alone retries, five times within random pauses of seconds: a server that
    restarts would now and then end the job. An answer without a body, as to HEAD, is not seen as
    one that asks to slow down either.
    """
    from s3fs import core

    others = core.CUSTOM_ERROR_HANDLER
    core.set_custom_error_handler(lambda error: _is_unavailable(error) or others(error))


def _is_unavailable(error: Exception) -> bool:
    from botocore.exceptions import ClientError, ConnectTimeoutError, EndpointConnectionError

    if isinstance(error, ClientError):
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return bool(status >= 500)
    return isinstance(error, EndpointConnectionError | ConnectTimeoutError)


@contextlib.contextmanager
def _errors_of(url: str) -> Iterator[None]:
    """Turn any exception of a file system's library into an `OSError` that names the URL.

    Raises:
        OSError: With `filename`, so that the command line reports it as a failure of storage.
    """
    try:
        yield
    except (D2IError, MemoryError):
        raise
    except OSError as err:
        err.filename = err.filename or url
        raise
    except Exception as err:
        # The errors of botocore, aiohttp, google.auth and others have no common base class.
        raise OSError(errno.EIO, f"{type(err).__name__}: {err}", url) from err


class _RemoteFile(io.RawIOBase):
    """A file of another file system, whose errors name it."""

    def __init__(self, file: IO[bytes], url: str) -> None:
        self._file = file
        self._url = url

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._file.seekable()

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readinto(self, buffer: Any) -> int:
        with _errors_of(self._url):
            data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


def _upload(path: Path, url: str) -> None:
    with _errors_of(url):
        fs, target = _split(url)
        if _has_buckets(fs):
            _check_bucket(fs, target, url)
        else:
            fs.makedirs(target.rpartition("/")[0], exist_ok=True)
        fs.put_file(str(path), target)
    path.unlink()


def _has_buckets(fs: Any) -> bool:
    """Return whether a file system is an object store, which has buckets and no directories."""
    return bool(_protocols(fs) & _OBJECT_STORES)


def _protocols(fs: Any) -> set[str]:
    return {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)


def _check_bucket(fs: Any, path: str, url: str) -> None:
    """Refuse a bucket that does not exist: making directories would create it, mistyped or not."""
    bucket = path.partition("/")[0]
    try:
        _look_for_bucket(fs, bucket)
    except FileNotFoundError as err:
        raise ConfigError(
            f"{url}: no bucket {bucket}; expected one that exists; create it, or correct the URL"
        ) from err


@cache
def _look_for_bucket(fs: Any, bucket: str) -> None:
    """Look for a bucket, once per process; a missing one is not cached.

    Raises:
        FileNotFoundError: If it does not exist.
    """
    try:
        fs.info(bucket)
    except FileNotFoundError:
        raise
    except OSError:
        # A user who may write to it need not be allowed to look it up, and a transient failure
        # proves nothing: the write itself, which is retried, will show.
        return


def _copy_beside(path: Path, target: Path) -> Path:
    """Move a file from another file system to a temporary name beside its target."""
    beside = _temporary_in(target.parent)
    try:
        shutil.copyfile(path, beside)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    path.unlink()
    return beside


def _temporary_in(directory: Path) -> Path:
    return directory / f".{secrets.token_hex(8)}{TEMPORARY_SUFFIX}"


def sync(path: Path) -> None:
    """Flush a file, or a directory's list of names, to disk, if its file system can."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as err:
        if err.errno not in (_NO_DIRECTORY_SYNC if path.is_dir() else _NO_SYNC):
            err.filename = err.filename or str(path)
            raise
