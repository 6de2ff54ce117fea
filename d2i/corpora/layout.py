"""Where the splits of a released corpus lie: their many names, one canonical one.

Must not import torch.
"""

from d2i import storage

SPLITS = {
    "train": ("train",),
    "valid": ("valid", "val", "dev", "validation"),
    "test": ("test",),
}
"""Canonical split names, and the names that releases use."""


def split_folder(source: str, split: str) -> str | None:
    """Return what the folder of a split is called in a source, or None where there is none."""
    present = set(storage.list_names(source))
    return next((name for name in SPLITS[split] if name in present), None)
