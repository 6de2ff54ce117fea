"""One unsplit file divided by shares: seeded, whole dialogs, and no image in two splits."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from d2i.cli.app import app
from d2i.corpora import RecordIssue, read_instances, splits
from d2i.dialog import Instance
from d2i.errors import ConfigError, DataError

SHARES = "0.8,0.1,0.1"
SPLITS = ("train", "valid", "test")
NUM_DIALOGS = 200


def write_chats(directory: Path, name: str = "all.jsonl") -> Path:
    """Write dialogs with an image each; every fourth also has that of the one before it."""
    lines = []
    for number in range(NUM_DIALOGS):
        images = [f"{number}.jpg", *([f"{number - 1}.jpg"] if number % 4 == 0 and number else [])]
        turns = [{"text": "a"}, {"text": f"b {number}", "images": images}]
        lines.append(json.dumps({"id": number, "turns": turns}))
    lines.insert(3, "{ broken")
    lines.insert(9, json.dumps({"id": 0, "turns": [{"text": "again"}]}))
    lines.append(json.dumps({"id": "silent", "turns": [{"text": "a"}]}))
    directory.mkdir(exist_ok=True)
    (directory / name).write_text("\n".join(lines))
    return directory / name


def read(
    source: Path, seed: int = 0, shares: str = SHARES
) -> tuple[dict[str, list[Instance]], list[RecordIssue]]:
    issues: list[RecordIssue] = []
    options: dict[str, Any] = {"split_shares": shares, "split_seed": seed}
    found = {
        split: list(read_instances("jsonl", source, split, on_problem=issues.append, **options))
        for split in splits("jsonl", source, options)
    }
    return found, issues


def dialogs(found: dict[str, list[Instance]]) -> dict[str, set[str]]:
    return {split: {i.dialog_id for i in instances} for split, instances in found.items()}


def test_split_shares_put_each_dialog_and_image_in_one_split(tmp_path: Path) -> None:
    found, issues = read(write_chats(tmp_path / "chats"))
    placed = dialogs(found)
    assert Counter(n for ids in placed.values() for n in ids) == Counter(
        map(str, range(NUM_DIALOGS))
    )
    assert {split: len(ids) for split, ids in placed.items()} == {
        "train": 160,
        "valid": 20,
        "test": 20,
    }
    image_refs = [{i.image_ref.value for i in instances} for instances in found.values()]
    assert sum(map(len, image_refs)) == len(set.union(*image_refs)) == NUM_DIALOGS
    assert all(i.split == split for split in found for i in found[split])
    # Each record issue is reported once, by one of the three readers.
    assert Counter(issue.reason for issue in issues) == {
        "truncated": 1,
        "duplicate_dialog_id": 1,
    }


def test_split_depends_on_seed_and_content_not_on_order(tmp_path: Path) -> None:
    source = write_chats(tmp_path / "chats")
    first, _ = read(source)
    assert dialogs(read(source.parent)[0]) == dialogs(first)
    assert dialogs(read(source, seed=1)[0]) != dialogs(first)
    lines = source.read_text().splitlines()
    source.write_text("\n".join(reversed(lines)))
    reversed_split = dialogs(read(source)[0])
    # Of the two dialogs with ID 0 the other one is now the first.
    assert sum(len(reversed_split[split] - ids) for split, ids in dialogs(first).items()) <= 4


def test_dialogs_that_share_image_stay_in_one_split(tmp_path: Path) -> None:
    turns = [{"text": "a", "images": ["meme.jpg"]}]
    lines = [json.dumps({"id": number, "turns": turns}) for number in range(70)]
    turns = [{"text": "a", "images": ["{}.jpg"]}]
    lines += [json.dumps({"id": n, "turns": turns}).replace("{}", str(n)) for n in range(70, 100)]
    (tmp_path / "chats.json").write_text(f"[{','.join(lines)}]")
    placed = dialogs(read(tmp_path)[0])
    assert {split: len(ids) for split, ids in placed.items()} == {
        "train": 80,
        "valid": 10,
        "test": 10,
    }
    assert {str(number) for number in range(70)} <= placed["train"]


def test_zero_share_makes_no_split_and_empty_split_is_rejected(tmp_path: Path) -> None:
    source = write_chats(tmp_path / "chats")
    assert set(read(source, shares="0.9,0,0.1")[0]) == {"train", "test"}
    lines = source.read_text().splitlines()[:2]
    source.write_text("\n".join(lines))
    with pytest.raises(DataError, match="valid: 0 of 2 dialogs fall into this split"):
        read(source)


@pytest.mark.parametrize("shares", ["0.8,0.1", "0.8,0.1,0.2", "a,b,c", "1.1,-0.1,0", "nan,0,1"])
def test_invalid_split_shares_are_rejected(tmp_path: Path, shares: str) -> None:
    with pytest.raises(ConfigError, match=r"write 0\.8,0\.1,0\.1"):
        read(write_chats(tmp_path / "chats"), shares=shares)


def test_split_shares_of_several_files_are_rejected(tmp_path: Path) -> None:
    write_chats(tmp_path / "chats")
    write_chats(tmp_path / "chats", "more.json")
    with pytest.raises(DataError, match=r"all\.jsonl, more\.json, expected one file"):
        read(tmp_path / "chats")


def test_split_shares_on_command_line_divide_one_file(tmp_path: Path) -> None:
    source = str(write_chats(tmp_path / "chats"))
    runner = CliRunner()
    arguments = ("--corpus", "jsonl", "--source", source)
    result = runner.invoke(
        app, ["corpus", *arguments, "--split", SHARES, "--sample", "0", "--json"]
    )
    found = json.loads(result.stdout)
    counts = {split: one["num_dialogs_with_images"] for split, one in found["splits"].items()}
    assert counts == {"train": 160, "valid": 20, "test": 20}
    assert found["leaks"]["counts"] == []
    out = (
        "--out",
        str(tmp_path / "out"),
        "--recipe",
        "demo",
        "--dry-run",
        "--json",
        "--workers",
        "0",
    )
    without_split = runner.invoke(app, ["preprocess", *arguments, *out])
    assert "divide one file with --split" in str(without_split.exception)
    planned = runner.invoke(app, ["preprocess", *arguments, *out, "--split", SHARES])
    assert planned.exit_code == 0, planned.output
    plans = json.loads(planned.stdout)
    assert [plans[split]["num_images"] for split in SPLITS] == [160, 20, 20]
    decided = plans["train"]["decided_by"]["recipe"]["corpus"]
    assert (decided["split_shares"], decided["split_seed"]) == (SHARES, 0)
