"""Images in tar files give the same samples as the directory they were packed from."""

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


def pack(directory: Path) -> str:
    """Write one tar per split, as in the released archives; return the pattern of their paths."""
    directory.mkdir()
    for split in ("train", "valid", "test"):
        with tarfile.open(directory / f"{split}.tar", "w") as tar:
            for path in sorted((SOURCE / split).glob("*.jpg")):
                tar.add(path, f"Dataset/{split}/{path.name}")
    return str(directory / "*.tar")


def test_tar_index_gives_same_samples_as_directory(
    tmp_path: Path, settings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    by_directory, by_tars = tmp_path / "by-folder", tmp_path / "by-tars"
    preprocess("mmdialog", SOURCE, by_directory, *settings)
    root = pack(tmp_path / "images")
    preprocess("mmdialog", SOURCE, by_tars, *settings, "--set", f"corpus.image_root={root}")
    for split in ("train", "valid", "test"):
        here, there = (read_manifest(str(out / split)) for out in (by_directory, by_tars))
        assert there.num_samples == here.num_samples > 0
        assert there.failures == here.failures
        sums = [
            {row.key: (row.reason, row.sha256) for row in read_ledger(str(out / split))}
            for out in (by_directory, by_tars)
        ]
        assert sums[0] == sums[1]
