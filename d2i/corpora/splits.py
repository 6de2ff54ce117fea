"""Where the splits of a released corpus lie: their many names, one canonical one.

Must not import torch.
"""

import json

from d2i import storage
from d2i.errors import DataError

SPLITS = {
    "train": ("train",),
    "valid": ("valid", "val", "dev", "validation"),
    "test": ("test",),
}
"""Canonical split names, and the names that releases use."""

DIALOG_SUFFIXES = (".jsonl", ".json")
_NAME_FILE = "corpus.json"
_MAX_NAME_FILE_BYTES = 4096


def corpus_name(source: str) -> str | None:
    """Return what a corpus calls itself: `name` of its `corpus.json`; None where it says nothing.

    It tells corpora of one layout apart: the demo's made world has MMDialog's, and is not MMDialog.
    """
    url = storage.join(source, _NAME_FILE)
    if not storage.exists(url) or storage.size_bytes(url) > _MAX_NAME_FILE_BYTES:
        return None
    try:
        found = json.loads(storage.read_bytes(url))
    except (ValueError, IsADirectoryError):
        return None
    name = found.get("name") if isinstance(found, dict) else None
    return name if isinstance(name, str) and name.isprintable() and name.strip() else None


def is_source_file(source: str) -> bool:
    """Say whether a source is one file of dialogs, rather than a folder of them."""
    return source.endswith(DIALOG_SUFFIXES)


def source_folder(source: str) -> str:
    """Return the folder of a source: what paths of pictures are relative to."""
    return (source.rpartition("/")[0] or ".") if is_source_file(source) else source


def unsplit_file(source: str) -> str:
    """Return the name of the one file of dialogs that a source is, or holds.

    Raises:
        DataError: If it holds none, or several.
    """
    if is_source_file(source):
        return source.rpartition("/")[2]
    names = [name for name in storage.list_names(source) if name.endswith(DIALOG_SUFFIXES)]
    found = [name for name in names if name != _NAME_FILE]
    if len(found) != 1:
        raise DataError(
            f"{source}: got {', '.join(found[:5]) or 'no .jsonl or .json file'}, expected one file "
            "to divide by shares; give its path as --source"
        )
    return found[0]


def split_folder(source: str, split: str) -> str | None:
    """Return what the folder of a split is called in a source, or None where there is none."""
    there = set(storage.list_names(source))
    present = [name for name in SPLITS[split] if name in there]
    return only_one(present, source) if present else None


def only_one(names: list[str], source: str) -> str:
    """Return the one name that a split has.

    Raises:
        DataError: If it has several: which one is meant cannot be told, and none is dropped unsaid.
    """
    if len(names) > 1:
        raise DataError(
            f"{source}: got {' and '.join(names)}, which name the same split; expected one of "
            "them; put the others elsewhere"
        )
    return names[0]
