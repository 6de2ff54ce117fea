"""Control characters of untrusted text are escaped wherever it is printed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from d2i.io.terminal import plain
from d2i.report.markdown_export import write_csv
from d2i.report.table import Cell, Row, Table
from d2i.shards import Sample, json_bytes, npy_bytes, write_manifest, write_shard
from tests.processes import run_process
from tests.samples import metadata

CLIPBOARD = "\x1b]52;c;cm0gLXJm\x07"
HOSTILE = f"hi {CLIPBOARD}\x1b[2J\x9b2J\u202etxt.exe\r\nforged\x00"
SHOWN = r"hi \x1b]52;c;cm0gLXJm\x07\x1b[2J\x9b2J\u202etxt.exe\r\nforged\x00"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (HOSTILE, SHOWN),
        ("naïve 日本語 می‌خواهم 👨‍👩‍👧 ☀️", "naïve 日本語 می‌خواهم 👨‍👩‍👧 ☀️"),
        ("a\u00a0b\u3000c\ud800", r"a b c\ud800"),
        ("\x7f\u200e\u2066", r"\x7f\u200e\u2066"),
    ],
)
def test_plain_escapes_control_characters(text: str, shown: str) -> None:
    assert plain(text) == shown


def test_commands_escape_control_characters(tmp_path: Path) -> None:
    """Escape samples, problems, errors and warnings."""
    directory = tmp_path / "test"
    directory.mkdir()
    document = metadata(
        "test-1", split="test", context=[{"speaker": 0, "text": HOSTILE}], labels=[HOSTILE]
    )
    document["source"]["ref"] = [f"{CLIPBOARD}.jpg"]
    members = {
        "json": json_bytes(document),
        "moments.npy": npy_bytes(np.zeros((8, 8, 8), np.float16)),
    }
    write_shard([Sample("test-1", members)], str(directory), 0, failures={})
    write_manifest(str(directory), {})
    inspected = run_process("inspect", directory)
    assert inspected.returncode == 0, inspected.stderr
    assert f"  0: {SHOWN}\n" in inspected.stdout
    assert r"\x1b]52;c;" in inspected.stdout.splitlines()[2]

    (directory / f"{CLIPBOARD}.tar").write_bytes(b"")
    verified = run_process("verify", directory)
    assert verified.returncode == 1
    assert r"\x1b]52;c;" in verified.stdout

    (tmp_path / "train.jsonl").write_text(json.dumps({"id": 1, HOSTILE: 2, "turns": HOSTILE}))
    surveyed = run_process("corpus", "--corpus", "jsonl", "--source", tmp_path, "--sample", "0")
    reported = run_process("report", f"{tmp_path}/\x1b[2J")
    assert reported.returncode == 2
    assert r"\x1b[2J" in reported.stderr
    for done in (inspected, verified, surveyed, reported):
        assert not set("\x1b\x07\x9b\x00\u202e") & set(done.stdout + done.stderr)


def test_traceback_escapes_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    import sys

    from d2i.io.terminal import print_plainly

    before = sys.excepthook
    try:
        print_plainly()
        sys.excepthook(ValueError, ValueError(HOSTILE), None)
    finally:
        sys.excepthook = before
    assert "\x1b" not in capsys.readouterr().err


@pytest.mark.parametrize("prefix", ["=", "+", "-", "@", "\t", "\r"])
def test_csv_cells_are_not_formulas(prefix: str) -> None:
    label = f"{prefix}HYPERLINK(0)"
    table = Table(label, (label, "b"), (Row(label, (Cell(-1.5), Cell(label)), label),))
    text = write_csv([table])
    assert text.startswith("table,row,column,value")
    assert text.count(f"'{label}") == text.count(label) == 6 + 2
    assert ",-1.5," in text
