"""Weights by name: the small models shipped with the package, and weights at a URL.

Names such as `demo:vae` stand for directories inside the installed package, so that a recipe and
the settings of a run hold no path of one machine.
"""

from __future__ import annotations

from pathlib import Path

from d2i.errors import ConfigError
from d2i.io import checksums, storage

_PREFIX = "demo:"
_DIRECTORY = Path(__file__).parent / "demo" / "weights"


def is_shipped(name: str) -> bool:
    """Return whether a name is that of weights shipped with the package, such as `demo:vae`."""
    return name.startswith(_PREFIX)


def resolve_weights(name: str) -> str:
    """Return the path of a shipped model or of a URL's local copy, or `name` itself.

    Args:
        name: Such as `demo:vae`; a URL of a file, or of a directory without subdirectories, which
            is fetched once; a path or a hub repository.

    Raises:
        OSError: If a URL cannot be read.
        ConfigError: If no shipped model has that name.
    """
    if not is_shipped(name):
        return str(storage.local_path(name) or _copy_of(name))
    directory = _DIRECTORY / name.removeprefix(_PREFIX)
    if not directory.is_dir():
        known = ", ".join(sorted(_PREFIX + p.name for p in _DIRECTORY.glob("*/")))
        raise ConfigError(f"{name}: no such shipped model; expected one of {known}")
    return str(directory)


def _copy_of(url: str) -> Path:
    """Return the local copy of a file or directory; refetch what does not match its sha256.

    If the original does not match its sha256 either, the reader of the copy refuses it.
    """
    path = storage.local_copies(url)
    is_directory = path.is_dir()
    if not is_directory and storage.exists(checksums.checksum_url(url)):
        line = storage.read_bytes(checksums.checksum_url(url))
        storage.write_bytes(checksums.checksum_url(str(path)), line)
    for file in sorted(path.iterdir()) if is_directory else [path]:
        recorded = checksums.read_checksum(str(file))
        if recorded is not None and recorded != checksums.file_sha256(str(file)):
            storage.fetch_file(storage.join(url, file.name) if is_directory else url, file)
    return path
