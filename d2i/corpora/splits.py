"""Layout of released corpora: the names of each split's directory or file.

Must not import torch.
"""

import json

from d2i.errors import DataError
from d2i.io import storage

SPLIT_ALIASES = {
    "train": ("train",),
    "valid": ("valid", "val", "dev", "validation"),
    "test": ("test",),
}
"""The names that releases use for the splits."""

DIALOG_SUFFIXES = (".jsonl", ".json")
_NAME_FILE = "corpus.json"
_MAX_NAME_FILE_BYTES = 4096


def corpus_name(source: str) -> str | None:
    """Return the name that a corpus has in its `corpus.json`, or None if it has none.

    It distinguishes corpora of the same layout, such as the demo's made world and MMDialog.
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
    """Return whether a source is one file of dialogs, rather than a directory of them."""
    return source.endswith(DIALOG_SUFFIXES)


def source_directory(source: str) -> str:
    """Return the directory of a source, which paths of images are relative to."""
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


def split_directory(source: str, split: str) -> str | None:
    """Return the name of a split's directory in a source, or None if there is none."""
    there = set(storage.list_names(source))
    present = [name for name in SPLIT_ALIASES[split] if name in there]
    return only_one(present, source) if present else None


def only_one(names: list[str], source: str) -> str:
    """Return the only name that a split has.

    Raises:
        DataError: If it has several, as it is unclear which one is meant.
    """
    if len(names) > 1:
        raise DataError(
            f"{source}: got {' and '.join(names)}, which name the same split; expected one of "
            "them; put the others elsewhere"
        )
    return names[0]
