"""Names and numbers that users, files and scripts rely on are as they were promised."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.contracts import HERE, names, words
from tests.contracts.numbers import numbers

WRITE = "as promised; where the change is meant: python -m tests.contracts"


def promised(name: str) -> Any:
    return json.loads((HERE / name).read_text())


@pytest.mark.parametrize(
    "kind", ["api", "fields", "settings", "options", "fault points", "environment"]
)
def test_names_of_settings_options_and_the_api_are_as_promised(kind: str) -> None:
    assert names()[kind] == promised("names.json")[kind], WRITE


def test_no_string_that_a_machine_reads_is_renamed() -> None:
    kept = (HERE / "words.txt").read_text().splitlines()
    assert not set(kept) - set(words()), WRITE


def test_draws_and_hashes_are_as_promised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    found = rounded(json.loads(json.dumps(numbers(tmp_path))))
    expected = rounded(promised("numbers.json"))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == value, f"{name}: {WRITE}"


def rounded(value: Any) -> Any:
    """Floats to seven digits: the last ones depend on the machine."""
    if isinstance(value, dict):
        return {name: rounded(part) for name, part in value.items()}
    if isinstance(value, list):
        return [rounded(part) for part in value]
    return float(f"{value:.7g}") if isinstance(value, float) else value
