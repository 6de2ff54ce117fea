"""The networks, a directory for each family, and reading and writing of their published weights.

The names below are imported on first use: commands that load no network read the families' presets,
and must start without torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from d2i.models.registry import build_backbone, changed_sizes, family, name_sizes
    from d2i.models.weights.load import load_weights, read_state_dict, save_weights

__all__ = [
    "build_backbone",
    "changed_sizes",
    "family",
    "load_weights",
    "name_sizes",
    "read_state_dict",
    "save_weights",
]
_MODULES = dict.fromkeys(__all__, "d2i.models.registry") | dict.fromkeys(
    ("load_weights", "read_state_dict", "save_weights"), "d2i.models.weights.load"
)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
