"""People, food and animals: which of PhotoChat's own labels belong to which."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from d2i.corpora import read_instances
from d2i.report.categories import read_classes
from tests.shared import SHARED, needs_shared

# What PhotoChat's own test files say of some of their photos, by dialogue_id.
DESCRIPTIONS: dict[str, str] = json.loads(
    Path(__file__).with_name("photochat_descriptions.json").read_text()
)["descriptions"]
PEOPLE = {0, 1, 4, 5, 8, 9, 11, 13, 14, 160, 322, 995, 996, 998, 999}
FOOD = {0, 2, 3, 4, 5, 6, 9, 10, 12, 14, 160, 162, 167, 322, 720, 997, 998}


def write_corpus(folder: Path) -> Path:
    """Write a test split of PhotoChat with the real descriptions."""
    records: list[dict[str, Any]] = [
        {
            "dialogue": [
                {"message": "look", "share_photo": False, "user_id": 0},
                {"message": "", "share_photo": True, "user_id": 0},
            ],
            "dialogue_id": int(number),
            "photo_description": description,
            "photo_url": f"https://photos.example/{number}_o.jpg",
        }
        for number, description in DESCRIPTIONS.items()
    ]
    (folder / "test").mkdir(parents=True)
    (folder / "test" / "test_00.json").write_text(json.dumps(records))
    return folder


def of_category(source: Path, name: str) -> set[int]:
    """The dialogs of a test split that belong to a category."""
    classes = read_classes()[name]
    found = read_instances("photochat", source, "test", on_problem=lambda _: None, max_broken=0.0)
    return {int(instance.dialog_id) for instance in found if classes & {*instance.labels}}


@pytest.mark.parametrize(("name", "expected"), [("people", PEOPLE), ("food", FOOD)])
def test_the_labels_of_photochat_are_found(tmp_path: Path, name: str, expected: set[int]) -> None:
    assert of_category(write_corpus(tmp_path), name) == expected


@needs_shared
def test_the_people_of_the_real_dialogs_are_found() -> None:
    source = SHARED / "data" / "photochat"
    assert of_category(source, "people") == {8, 996}
    assert not of_category(source, "food") | of_category(source, "animals")


def test_the_words_of_the_papers_figure_1_belong_somewhere() -> None:
    classes = read_classes()
    assert {"Head", "Face", "Hair"} <= classes["people"]
    assert "Drink" in classes["food"]
