"""Regenerate the golden lists of promised names from this checkout."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from tests.contracts import HERE, names, on_disk, words
from tests.contracts.numbers import numbers
from tests.made_before.make import run_all


def main() -> None:
    """Write the golden lists beside this file."""
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch) / "made"
        printed = run_all(made)
        write("on_disk.json", on_disk(made, printed))
        (Path(scratch) / "numbers").mkdir()
        write("numbers.json", numbers(Path(scratch) / "numbers"))
    write("names.json", names())
    (HERE / "words.txt").write_text("".join(f"{word}\n" for word in words()))


def write(name: str, found: dict[str, Any]) -> None:
    (HERE / name).write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
