"""Dialog to image: generate the image that answers a conversation.

The names below are loaded when they are first used, so that `import d2i` imports neither torch nor
any other part of d2i. `__init__.pyi` tells their types.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_PLACES = {
    "Dataset": "d2i.shards.map_dataset",
    "GenerationError": "d2i.errors",
    "Model": "d2i.eval.loaded_model",
    "Read": "d2i.eval.system",
    "Turn": "d2i.dialog",
    "load": "d2i.eval.loaded_model",
    "webdataset": "d2i.shards.map_dataset",
}

__all__ = ["Dataset", "GenerationError", "Model", "Read", "Turn", "load", "webdataset"]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'd2i' has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(_PLACES[name]), name)
    except ModuleNotFoundError as err:
        from d2i.errors import with_extra

        raise with_extra(err) from err


def __dir__() -> list[str]:
    return sorted([*globals(), *_PLACES])
