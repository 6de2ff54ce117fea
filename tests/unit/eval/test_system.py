"""Parts of a system's name."""

from __future__ import annotations

import pytest

from d2i.eval.system import SystemSpec


@pytest.mark.parametrize(
    ("name", "kind", "target", "run_dir"),
    [
        ("uvit-s", "uvit-s", "", None),
        ("run:s3://bucket/run", "run", "s3://bucket/run", "s3://bucket/run"),
        ("images:/pictures", "images", "/pictures", None),
        ("package.module:build", "package.module", "build", None),
    ],
)
def test_parts_of_name(name: str, kind: str, target: str, run_dir: str | None) -> None:
    spec = SystemSpec(name, "label")
    assert (spec.kind, spec.target, spec.run_dir) == (kind, target, run_dir)


def test_target_of_divter_is_its_captioner() -> None:
    """Paths may contain commas."""
    inner = SystemSpec("images:/a,b", "label")
    spec = SystemSpec(f"divter:/c,d,{inner.name}", "label", inner=inner)
    assert (spec.kind, spec.target, spec.run_dir) == ("divter", "/c,d", None)
