"""`d2i doctor --recipe` tells the memory of a training, and the setting that makes it fit."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from d2i.cli.app import app
from d2i.doctor import machine


@pytest.fixture(autouse=True)
def no_machine_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_CHECKS", ())


def ask_doctor(*arguments: str) -> tuple[int, dict[str, str]]:
    done = CliRunner().invoke(app, ["doctor", "--json", *arguments])
    (row,) = json.loads(done.stdout.splitlines()[-1])["checks"]
    return done.exit_code, row


def test_training_that_fits_is_told_by_its_parts() -> None:
    code, row = ask_doctor("--recipe", "demo")
    assert (code, row["name"], row["status"], row["fix"]) == (0, "memory of demo", "ok", "")
    for part in ("GB a rank: weights", "moments", "ema", "activations"):
        assert part in row["detail"]


def test_setting_that_is_told_makes_training_fit() -> None:
    size = ("--recipe", "demo", "--memory-gb", "0.05")
    code, row = ask_doctor(*size)
    assert (code, row["status"]) == (0, "warn")
    assert row["detail"].endswith("; expected at most 0.05 GB")
    assert row["fix"].startswith("use --set train.")
    code, row = ask_doctor(*size, *row["fix"].split()[1:])
    assert (code, row["status"]) == (0, "ok")


def test_training_that_nothing_makes_fit_is_told() -> None:
    _, row = ask_doctor("--recipe", "demo", "--memory-gb", "0.000001")
    assert "no setting makes it fit" in row["detail"] + row["fix"]


def test_recipe_that_is_not_there_fails() -> None:
    code, row = ask_doctor("--recipe", "nope")
    assert (code, row["status"]) == (1, "fail")
    assert row["fix"]
