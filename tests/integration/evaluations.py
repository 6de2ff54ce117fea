"""An evaluation by a system that keeps account, and what it leaves."""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import Any


def command(data: Path | str, out: Path | str, *extra: object) -> list[Any]:
    """The words of `d2i eval`."""
    return [
        *("eval", "--system", "tests.integration.logged:build", "--data", data, "--out", out),
        *("--save-images", "all", "--json"),
        *("--set", "sample.num_steps=2", "--set", "sample.compute_batch_size=4", *extra),
    ]


def pictures(out: Path) -> dict[str, bytes]:
    """The drawn pictures by name, each kept once."""
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
    """Scores, rows and pictures are the same to the byte."""
    assert (out / "scores.json").read_bytes() == (whole / "scores.json").read_bytes()
    assert (out / "instances.jsonl").read_bytes() == (whole / "instances.jsonl").read_bytes()
    assert pictures(out) == pictures(whole)
