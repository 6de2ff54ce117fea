"""One unsplit file divided by shares: seeded, whole dialogs, and no picture in two splits."""

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


def write_chats(folder: Path, name: str = "all.jsonl") -> Path:
    """Each dialog has a picture of its own; every fourth also that of the one before it."""
    lines = []
    for number in range(NUM_DIALOGS):
        images = [f"{number}.jpg", *([f"{number - 1}.jpg"] if number % 4 == 0 and number else [])]
        turns = [{"text": "a"}, {"text": f"b {number}", "images": images}]
        lines.append(json.dumps({"id": number, "turns": turns}))
    lines.insert(3, "{ broken")
    lines.insert(9, json.dumps({"id": 0, "turns": [{"text": "again"}]}))
    lines.append(json.dumps({"id": "silent", "turns": [{"text": "a"}]}))
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("\n".join(lines))
    return folder / name


def read(
    source: Path, seed: int = 0, shares: str = SHARES
) -> tuple[dict[str, list[Instance]], list[RecordIssue]]:
    problems: list[RecordIssue] = []
    options: dict[str, Any] = {"split_shares": shares, "split_seed": seed}
    found = {
        split: list(read_instances("jsonl", source, split, on_problem=problems.append, **options))
        for split in splits("jsonl", source, options)
    }
    return found, problems


def dialogs(found: dict[str, list[Instance]]) -> dict[str, set[str]]:
    return {split: {i.dialog_id for i in instances} for split, instances in found.items()}


def test_every_dialog_and_every_picture_is_in_one_split(tmp_path: Path) -> None:
    found, problems = read(write_chats(tmp_path / "chats"))
    placed = dialogs(found)
    assert Counter(n for ids in placed.values() for n in ids) == Counter(
        map(str, range(NUM_DIALOGS))
    )
    assert {split: len(ids) for split, ids in placed.items()} == {
        "train": 160,
        "valid": 20,
        "test": 20,
    }
    pictures = [{i.image_ref.value for i in instances} for instances in found.values()]
    assert sum(map(len, pictures)) == len(set.union(*pictures)) == NUM_DIALOGS
    assert all(i.split == split for split in found for i in found[split])
    # Each problem is told once, by one of the three readings.
    assert Counter(problem.reason for problem in problems) == {
        "truncated": 1,
        "duplicate_dialog_id": 1,
    }


def test_the_seed_and_the_content_decide_and_not_the_order(tmp_path: Path) -> None:
    source = write_chats(tmp_path / "chats")
    first, _ = read(source)
    assert dialogs(read(source.parent)[0]) == dialogs(first)
    assert dialogs(read(source, seed=1)[0]) != dialogs(first)
    lines = source.read_text().splitlines()
    source.write_text("\n".join(reversed(lines)))
    turned = dialogs(read(source)[0])
    # Of the two dialogs called 0 the other one is the first now.
    assert sum(len(turned[split] - ids) for split, ids in dialogs(first).items()) <= 4


def test_a_picture_that_most_dialogs_show_leaves_them_together(tmp_path: Path) -> None:
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


def test_a_share_of_nothing_makes_no_split_and_too_small_a_one_is_refused(tmp_path: Path) -> None:
    source = write_chats(tmp_path / "chats")
    assert set(read(source, shares="0.9,0,0.1")[0]) == {"train", "test"}
    lines = source.read_text().splitlines()[:2]
    source.write_text("\n".join(lines))
    with pytest.raises(DataError, match="valid: 0 of 2 dialogs fall into this split"):
        read(source)


@pytest.mark.parametrize("shares", ["0.8,0.1", "0.8,0.1,0.2", "a,b,c", "1.1,-0.1,0", "nan,0,1"])
def test_what_are_no_shares_is_refused(tmp_path: Path, shares: str) -> None:
    with pytest.raises(ConfigError, match=r"write 0\.8,0\.1,0\.1"):
        read(write_chats(tmp_path / "chats"), shares=shares)


def test_a_folder_of_several_files_is_not_guessed_at(tmp_path: Path) -> None:
    write_chats(tmp_path / "chats")
    write_chats(tmp_path / "chats", "more.json")
    with pytest.raises(DataError, match=r"all\.jsonl, more\.json, expected one file"):
        read(tmp_path / "chats")


def test_the_command_line_divides_one_file(tmp_path: Path) -> None:
    source = str(write_chats(tmp_path / "chats"))
    runner = CliRunner()
    asked = ("--corpus", "jsonl", "--source", source)
    said = runner.invoke(app, ["corpus", *asked, "--split", SHARES, "--sample", "0", "--json"])
    found = json.loads(said.stdout)
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
    plain = runner.invoke(app, ["preprocess", *asked, *out])
    assert "divide one file with --split" in str(plain.exception)
    planned = runner.invoke(app, ["preprocess", *asked, *out, "--split", SHARES])
    assert planned.exit_code == 0, planned.output
    plans = json.loads(planned.stdout)
    assert [plans[split]["num_images"] for split in SPLITS] == [160, 20, 20]
    decided = plans["train"]["decided_by"]["recipe"]["corpus"]
    assert (decided["split_shares"], decided["split_seed"]) == (SHARES, 0)
