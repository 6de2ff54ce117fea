"""Captions for a corpus without any: made by a captioner, marked with its name, resumable."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import pytest
from PIL import Image

from d2i.corpora import read_instances
from d2i.corpus_analysis import captioning
from tests.integration.networks import save_random_captioner
from tests.processes import run_d2i, run_process

NUM_IMAGES = 20


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    """Twenty images, one shared twice; one missing file, and one image given by URL."""
    directory = tmp_path / "chats"
    (directory / "p").mkdir(parents=True)
    images = [f"p/{number}.png" for number in range(NUM_IMAGES)]
    for number, name in enumerate(images):
        Image.new("RGB", (40, 30), (12 * number, 90, 200)).save(directory / name)
    names = [*images, images[0], "p/missing.png", "https://pictures.example/1.jpg"]
    lines = [
        json.dumps({"id": n, "turns": [{"text": "see", "images": [name]}]})
        for n, name in enumerate(names)
    ]
    (directory / "train.jsonl").write_text("\n".join(lines))
    return directory


@pytest.mark.parametrize(
    "kind", [pytest.param("blip", marks=pytest.mark.soak), "vision-encoder-decoder"]
)
def test_captioning_resumes_and_records_captioner(
    tmp_path: Path, chats: Path, kind: Literal["blip", "vision-encoder-decoder"]
) -> None:
    captioner, out = tmp_path / "captioner", tmp_path / "descriptions.jsonl"
    save_random_captioner(captioner, kind)
    command = ["corpus", "--corpus", "jsonl", "--source", chats, "--json"]
    command += ["--describe", captioner, "--descriptions", out]
    failures = {"missing_file": 1, "no_file": 1}
    expected = {"num_described": NUM_IMAGES, "num_there": 0, "failures": failures}
    assert run_d2i(*command) == expected | {"descriptions": str(out)}
    whole = out.read_bytes()
    assert len(whole.splitlines()) == NUM_IMAGES

    # Truncated within a line, as after a kill: the same command resumes to the same file.
    cut = whole.index(b"p/7.png") + 4
    out.write_bytes(whole[:cut])
    resumed = run_d2i(*command)
    assert (resumed["num_described"], resumed["num_there"]) == (NUM_IMAGES - 7, 7)
    assert out.read_bytes() == whole

    instances = list(read_instances("jsonl", chats, "train", descriptions=str(out)))
    described = [i for i in instances if i.description is not None]
    assert len(described) == NUM_IMAGES + 1
    assert {i.description_by for i in described} == {str(captioner)}
    assert described[0].description == described[-1].description != ""
    assert all(i.description_by is None for i in instances if i.description is None)

    again = run_process(*command[:-4], "--describe", "another/one", "--descriptions", out)
    assert again.returncode == 2
    assert "has captions by" in again.stderr


def test_corpus_description_overrides_generated_one(tmp_path: Path) -> None:
    record = {
        "dialogue": [
            {"message": "look", "share_photo": False, "user_id": 0},
            {"message": "", "share_photo": True, "user_id": 0},
        ],
        "dialogue_id": 1,
        "photo_description": "Objects in the photo: Boy",
        "photo_url": "https://farm1.staticflickr.com/1_o.jpg",
    }
    (tmp_path / "train").mkdir()
    (tmp_path / "train/train_00.json").write_text(json.dumps([record]))
    made = {"image": "/1_o.jpg", "description": "made", "made_by": "m"}
    (tmp_path / "made.jsonl").write_text(json.dumps(made))
    path = str(tmp_path / "made.jsonl")
    (found,) = read_instances("photochat", tmp_path, "train", descriptions=path)
    assert (found.description, found.description_by) == ("Objects in the photo: Boy", None)
    del record["photo_description"]
    (tmp_path / "train/train_00.json").write_text(json.dumps([record]))
    (found,) = read_instances("photochat", tmp_path, "train", descriptions=path)
    assert (found.description, found.description_by) == ("made", "m")


@pytest.mark.parametrize(
    ("content", "message"),
    [('{"image": "a"}', "missing required field"), ("no json", "invalid_json"), (None, "no such")],
)
def test_invalid_descriptions_file_is_one_line_error(
    tmp_path: Path, chats: Path, content: str | None, message: str
) -> None:
    path = tmp_path / "made.jsonl"
    if content is not None:
        path.write_text(content)
    done = run_process(
        *("preprocess", "--corpus", "jsonl", "--source", chats, "--out", tmp_path / "out"),
        *("--recipe", "demo", "--dry-run", "--set", f"corpus.descriptions={path}"),
    )
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_describe_without_descriptions_is_error(chats: Path) -> None:
    assert captioning.BATCH_SIZE < NUM_IMAGES
    done = run_process("corpus", "--corpus", "jsonl", "--source", chats, "--describe", "some/model")
    assert done.returncode == 2
    assert "only one of --describe and --descriptions" in done.stderr
