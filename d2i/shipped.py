"""The small published model that comes with the package, by name.

`demo:vae` and its like stand for folders inside the installed package, so that a recipe and the
settings of a run hold no path of one machine.
"""

from __future__ import annotations

from pathlib import Path

from d2i.errors import ConfigError

_PREFIX = "demo:"
_FOLDER = Path(__file__).parent / "demo" / "weights"


def resolve_weights(name: str) -> str:
    """Return the folder of a shipped model, or `name` itself (a path or a hub repository).

    Raises:
        ConfigError: If no shipped model has that name.
    """
    if not name.startswith(_PREFIX):
        return name
    folder = _FOLDER / name.removeprefix(_PREFIX)
    if not folder.is_dir():
        known = ", ".join(sorted(_PREFIX + p.name for p in _FOLDER.glob("*/")))
        raise ConfigError(f"{name}: no such shipped model; expected one of {known}")
    return str(folder)
