"""The hashes of what a system is loaded from do not depend on the current directory."""

from __future__ import annotations

from pathlib import Path

import pytest

from d2i.eval.fingerprint import hash_contents
from d2i.eval.system import SystemSpec


def test_name_of_own_function_is_no_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "build").mkdir()
    (tmp_path / "build" / "file").write_text("a")
    assert hash_contents(SystemSpec("package.module:build", "build")) == {}


def test_images_of_directory_are_hashed(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"a")
    spec = SystemSpec(f"images:{tmp_path}", "images")
    before = hash_contents(spec)
    assert before.keys() == {str(tmp_path)}
    (tmp_path / "a.png").write_bytes(b"b")
    assert hash_contents(spec) != before
