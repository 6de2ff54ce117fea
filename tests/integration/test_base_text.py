"""`d2i doctor --weights` shows the licence of a pipeline, and probes its text; errors are rows."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from d2i.cli.app import app
from d2i.doctor import machine
from d2i.doctor.base_text import check_licence
from d2i.encoders.prompt_truncation import PromptTruncation
from tests.integration.pipelines import save_tiny_flux, save_tiny_sd15, save_tiny_unconditional


@pytest.fixture
def no_machine_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_CHECKS", ())


def ask_doctor(directory: Path) -> tuple[int, dict[str, str]]:
    done = CliRunner().invoke(app, ["doctor", "--weights", str(directory), "--json"])
    licence, row = json.loads(done.stdout.splitlines()[-1])["checks"]
    assert licence["name"] == f"licence of {directory}"
    assert row["name"] == f"text of {directory}"
    return done.exit_code, row


@pytest.mark.usefixtures("no_machine_checks")
def test_doctor_shows_windows_of_good_pipeline(tmp_path: Path) -> None:
    save_tiny_flux(tmp_path / "pipeline")
    code, row = ask_doctor(tmp_path / "pipeline")
    assert (code, row["status"], row["fix"]) == (0, "ok", "")
    assert row["detail"] == (
        "text_encoder: 77 tokens, 75 of a dialog; text_encoder_2: 512 tokens, 511 of a dialog"
    )


@pytest.mark.parametrize(
    ("card", "status", "detail"),
    [
        ("license: apache-2.0", "ok", "apache-2.0, which holds for what is trained, too"),
        (
            "license: other\nlicense_name: flux-non-commercial-license",
            "warn",
            "flux-non-commercial-license",
        ),
        (None, "warn", "the published weights of this family are under CreativeML OpenRAIL-M"),
    ],
)
def test_doctor_shows_licence(tmp_path: Path, card: str | None, status: str, detail: str) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    if card:
        (tmp_path / "README.md").write_text(f"---\n{card}\n---\n")
    row = check_licence(str(tmp_path))
    assert row.status == status
    assert detail in row.detail


def leave_empty(directory: Path) -> None:
    directory.mkdir()


def save_without(part: str) -> Callable[[Path], None]:
    def save(directory: Path) -> None:
        save_tiny_sd15(directory)
        for file in (directory / part).iterdir():
            file.unlink()

    return save


def save_unknown_class(directory: Path) -> None:
    directory.mkdir()
    (directory / "model_index.json").write_text('{"_class_name": "NewPipeline"}')


@pytest.mark.usefixtures("no_machine_checks")
@pytest.mark.parametrize(
    ("save", "detail", "fix"),
    [
        (lambda _: None, "no such directory", "give --weights DIR"),
        (leave_empty, "model_index.json does not exist", "copy the whole pipeline"),
        (save_without("text_encoder"), "cannot load its text encoders", "copy the whole pipeline"),
        (save_without("tokenizer"), "cannot generate from a prompt", "check sample.pipeline"),
        (save_unknown_class, "is a NewPipeline", "update diffusers, or use another base model"),
        (save_tiny_unconditional, "DDPMPipeline takes no prompt", ".*another.*"),
    ],
    ids=["nowhere", "empty", "no-encoder", "no-tokenizer", "unknown", "no-text"],
)
def test_doctor_row_says_why_pipeline_cannot_be_read(
    tmp_path: Path, save: Callable[[Path], None], detail: str, fix: str
) -> None:
    save(tmp_path / "pipeline")
    code, row = ask_doctor(tmp_path / "pipeline")
    assert (code, row["status"]) == (1, "fail")
    assert detail in row["detail"]
    assert re.fullmatch(fix, row["fix"])


@pytest.mark.usefixtures("no_machine_checks")
def test_doctor_fails_where_messages_spell_special_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny_sd15(tmp_path / "pipeline")
    monkeypatch.setattr(PromptTruncation, "read", lambda _, line: line)
    code, row = ask_doctor(tmp_path / "pipeline")
    assert (code, row["status"]) == (1, "fail")
    assert row["detail"] == (
        "text_encoder: got the special token <|startoftext|> for a message that spells it; "
        "expected plain text"
    )
    assert row["fix"].startswith("copy its tokenizers again")
