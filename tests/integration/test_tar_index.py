"""Pictures handed around as tars: the same shards as from the folder they were packed from."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest

from d2i.preprocess.ledger import read_ledger
from d2i.shards import read_manifest
from tests.integration.commands import preprocess
from tests.shared import SHARED, needs_shared

pytestmark = needs_shared

SOURCE = SHARED / "data" / "mmdialog"


def pack(folder: Path) -> str:
    """One tar a split, as an archive of the release would be, and a link in place of a picture."""
    folder.mkdir()
    for split in ("train", "valid", "test"):
        with tarfile.open(folder / f"{split}.tar", "w") as tar:
            for path in sorted((SOURCE / split).glob("*.jpg")):
                tar.add(path, f"Dataset/{split}/{path.name}")
    return str(folder / "*.tar")


def test_tars_give_what_their_folder_gives(
    tmp_path: Path, settings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    by_folder, by_tars = tmp_path / "by-folder", tmp_path / "by-tars"
    preprocess("mmdialog", SOURCE, by_folder, *settings)
    root = pack(tmp_path / "images")
    preprocess("mmdialog", SOURCE, by_tars, *settings, "--set", f"corpus.image_root={root}")
    for split in ("train", "valid", "test"):
        here, there = (read_manifest(str(out / split)) for out in (by_folder, by_tars))
        assert there.num_samples == here.num_samples > 0
        assert there.failures == here.failures
        sums = [
            {row.key: (row.reason, row.sha256) for row in read_ledger(str(out / split))}
            for out in (by_folder, by_tars)
        ]
        assert sums[0] == sums[1]
