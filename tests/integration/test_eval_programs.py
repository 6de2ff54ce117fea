"""The programs of eval/ run as they are read: from prepared data to the tables."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

from tests.integration.chats import picture, sends
from tests.integration.commands import preprocess
from tests.integration.networks import save_random_describer
from tests.processes import run_d2i
from tests.servers import WebServer, running

ROOT = Path(__file__).resolve().parents[2]
# What PhotoChat's own test files say of some of their photos.
DESCRIPTIONS = json.loads((ROOT / "tests/unit/photochat_descriptions.json").read_text())


def run(program: str, *arguments: object) -> str:
    command = [sys.executable, str(ROOT / "eval" / program), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def rows(path: Path, table: str) -> set[str]:
    with path.open() as file:
        return {line["row"] for line in csv.DictReader(file) if line["table"].startswith(table)}


def test_the_tables_of_a_small_study(tmp_path: Path, chat_data: Path) -> None:
    few = ("--set", "sample.num_steps=2", "--workers", "0")
    systems = ("--system", "uvit-s=demo:backbone", "--system", f"retrieve:{chat_data}")
    run("table2.py", chat_data, tmp_path / "two", *systems, *few)
    assert rows(tmp_path / "two/table2.csv", "Systems on jsonl") == {
        "U-ViT-Small",
        "nearest training picture",
    }
    run(
        *("table3.py", chat_data, tmp_path / "three", "--system", "uvit-s"),
        *("--weights", "demo:backbone", *few),
    )
    strategies = {"hash", "space", "special", "letters"}
    assert rows(tmp_path / "three/table3.csv", "Linearizations") == strategies
    folders = [tmp_path / "two" / "uvit-s-demo-backbone"]
    run("cases.py", *folders, "--out", tmp_path / "cases.html")
    assert (tmp_path / "cases.html").read_text().count('<article class="conversation"') == 12
    run("figure5.py", *folders, "--out", tmp_path / "figure5.html")
    assert '<section id="cards">' in (tmp_path / "figure5.html").read_text()


def write_photochat(folder: Path, host: str, number: int) -> Path:
    """Write a test split with PhotoChat's real descriptions in turn, and photos at a host."""
    descriptions = [*DESCRIPTIONS["descriptions"].values()]
    records = [
        {
            "dialogue": [
                {"message": f"look at {place}", "share_photo": False, "user_id": 0},
                {"message": "", "share_photo": True, "user_id": 0},
            ],
            "dialogue_id": place,
            "photo_description": descriptions[place % len(descriptions)],
            "photo_url": f"http://{host}/{place}.jpg",
        }
        for place in range(number)
    ]
    (folder / "test").mkdir(parents=True)
    (folder / "test" / "test_00.json").write_text(json.dumps(records))
    return folder


def test_figure_5_of_photochat(tmp_path: Path, chat_data: Path) -> None:
    number = 3 * len(DESCRIPTIONS["descriptions"])
    answers = {
        f"/{place}.jpg": sends(
            picture(size=(64 + place, 64)), 200, **{"Content-Type": "image/jpeg"}
        )
        for place in range(number)
    }
    with running(WebServer("127.0.0.1", answers)) as web:
        host = f"127.0.0.1:{web.port}"
        source = write_photochat(tmp_path / "source", host, number)
        prepared = preprocess("photochat", source, tmp_path / "data", "--allow-host", host)
    assert prepared["test"]["num_written"] == number
    out = tmp_path / "scores"
    system = f"retrieve:{chat_data}"
    run_d2i("eval", "--system", system, "--data", tmp_path / "data", "--out", out, "--json")
    kept = (out / "categories.json").read_bytes()
    document = json.loads(kept)
    # 15 of the 26 descriptions show people, 17 food, and 8 of them both.
    counts = {c["name"]: (c["num_instances"], c["num_draws"]) for c in document["categories"]}
    assert counts == {"people": (45, 1), "food": (51, 20)}
    assert document["num_in_two"] == 24
    food = document["categories"][1]
    assert food["fid"] > 0 < food["fid_std"]
    assert food["clip_i_interval"][0] < food["clip_i"] < food["clip_i_interval"][1] <= 100

    # An evaluation made before: the program scores it from the features kept.
    (out / "categories.json").unlink()
    run("figure5.py", out, "--out", tmp_path / "figure5.html")
    assert (out / "categories.json").read_bytes() == kept
    page = (tmp_path / "figure5.html").read_text()
    assert "Food: 51 instances (Figure 5)" in page
    assert "24 instances are in two categories" in page
    assert "Not comparable between categories" in page
    run("figure5.py", out, "--out", tmp_path / "figure5.csv")
    with (tmp_path / "figure5.csv").open() as file:
        found = {row["column"]: row for row in csv.DictReader(file) if row["table"][:4] == "Food"}
    assert set(found) == {"pictures", "FID", "IS", "KID", "CLIP-I"}
    assert float(found["FID"]["deviation"]) == food["fid_std"]
    assert found["FID"]["low"] == ""


def test_divter_and_minigpt5(tmp_path: Path, chat_data: Path) -> None:
    save_random_describer(tmp_path / "base")
    said = run(
        *("divter.py", chat_data, tmp_path / "describer", "--base", tmp_path / "base"),
        *("--num-steps", 2),
    )
    assert said.startswith("12 descriptions learned from")
    assert (tmp_path / "describer/model.safetensors").is_file()
    assert run("minigpt5.py", chat_data, tmp_path / "in").startswith("23 dialogs")
