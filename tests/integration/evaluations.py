"""An evaluation by the logging system, and readers of its output."""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import Any


def command(data: Path | str, out: Path | str, *extra: object) -> list[Any]:
    """Return the `d2i eval` command."""
    return [
        *("eval", "--system", "tests.integration.logged:build", "--data", data, "--out", out),
        *("--save-images", "all", "--json"),
        *("--set", "sample.num_steps=2", "--set", "sample.compute_batch_size=4", *extra),
    ]


def images_by_name(out: Path) -> dict[str, bytes]:
    """Return the generated images by name; each must be stored once."""
    found: dict[str, bytes] = {}
    for path in sorted((out / "images").glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None
                assert member.name not in found
                found[member.name] = file.read()
    return found


def assert_same(out: Path, whole: Path) -> None:
    """Assert that scores, rows and images are the same to the byte."""
    assert (out / "scores.json").read_bytes() == (whole / "scores.json").read_bytes()
    assert (out / "instances.jsonl").read_bytes() == (whole / "instances.jsonl").read_bytes()
    assert images_by_name(out) == images_by_name(whole)
