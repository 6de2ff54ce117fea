"""Weights by name: the small published model that comes with the package, and those at a URL.

`demo:vae` and its like stand for folders inside the installed package, so that a recipe and the
settings of a run hold no path of one machine.
"""

from __future__ import annotations

from pathlib import Path

from d2i import storage
from d2i.errors import ConfigError

_PREFIX = "demo:"
_FOLDER = Path(__file__).parent / "demo" / "weights"


def is_shipped(name: str) -> bool:
    """Say whether a name is that of weights that come with the package, such as `demo:vae`."""
    return name.startswith(_PREFIX)


def resolve_weights(name: str) -> str:
    """Return the path of a shipped model or of a URL's copy here, or `name` itself.

    Args:
        name: Such as `demo:vae`; a URL of a file, or of a folder without folders in it, which is
            fetched once; a path or a hub repository.

    Raises:
        OSError: If a URL cannot be read.
        ConfigError: If no shipped model has that name.
    """
    if not is_shipped(name):
        return str(storage.local_path(name) or storage.local_copies(name))
    folder = _FOLDER / name.removeprefix(_PREFIX)
    if not folder.is_dir():
        known = ", ".join(sorted(_PREFIX + p.name for p in _FOLDER.glob("*/")))
        raise ConfigError(f"{name}: no such shipped model; expected one of {known}")
    return str(folder)
