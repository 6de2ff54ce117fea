"""Names and numbers that users, files and scripts rely on match the stored contracts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.contracts import HERE, names, words
from tests.contracts.numbers import numbers

WRITE = "as promised; where the change is meant: python -m tests.contracts"


def read_contract(name: str) -> Any:
    return json.loads((HERE / name).read_text())


@pytest.mark.parametrize(
    "kind", ["api", "fields", "settings", "options", "fault points", "environment"]
)
def test_public_names_match_contract(kind: str) -> None:
    assert names()[kind] == read_contract("names.json")[kind], WRITE


def test_machine_read_strings_are_not_renamed() -> None:
    kept = (HERE / "words.txt").read_text().splitlines()
    assert not set(kept) - set(words()), WRITE


def test_random_draws_and_hashes_match_contract(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    found = rounded(json.loads(json.dumps(numbers(tmp_path))))
    expected = rounded(read_contract("numbers.json"))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == value, f"{name}: {WRITE}"


def rounded(value: Any) -> Any:
    """Round floats to seven digits; the last ones depend on the machine."""
    if isinstance(value, dict):
        return {name: rounded(part) for name, part in value.items()}
    if isinstance(value, list):
        return [rounded(part) for part in value]
    return float(f"{value:.7g}") if isinstance(value, float) else value
