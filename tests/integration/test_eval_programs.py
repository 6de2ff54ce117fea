"""The programs of eval/, from prepared data to the tables."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from d2i.dialog import TEMPLATES
from tests.command_lines import parse_d2i
from tests.integration.chats import noise_image, sends
from tests.integration.commands import preprocess
from tests.integration.networks import save_random_describer
from tests.integration.training import write_split
from tests.processes import run_d2i, run_process
from tests.servers import WebServer, running

ROOT = Path(__file__).resolve().parents[2]
# Photo descriptions from PhotoChat's own test files.
DESCRIPTIONS = json.loads(
    (ROOT / "tests/unit/eval/metrics" / "photochat_descriptions.json").read_text()
)


def start(program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "eval" / program), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


def run(program: str, *arguments: object) -> str:
    done = start(program, *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def rows(path: Path, table: str) -> set[str]:
    with path.open() as file:
        return {line["row"] for line in csv.DictReader(file) if line["table"].startswith(table)}


def test_table2_cases_and_figure5_of_small_study(tmp_path: Path, chat_data: Path) -> None:
    few = ("--set", "sample.num_steps=2", "--workers", "0")
    systems = ("--system", "uvit-s=demo:backbone", "--system", f"retrieve:{chat_data}")
    run("table2.py", chat_data, tmp_path / "two", *systems, *few)
    assert rows(tmp_path / "two/table2.csv", "Systems on jsonl") == {
        "demo network, not fine-tuned",
        "nearest training picture",
    }
    directories = [tmp_path / "two" / "uvit-s-demo-backbone"]
    run("cases.py", *directories, "--out", tmp_path / "cases.html")
    assert (tmp_path / "cases.html").read_text().count('<article class="conversation"') == 12
    key = re.findall(r'aria-label="(test-[^"]+)"', (tmp_path / "cases.html").read_text())[5]
    run("cases.py", *directories, "--out", tmp_path / "case.html", "--case", key)
    assert (tmp_path / "case.html").read_text().count('<article class="conversation"') == 1
    run("figure5.py", *directories, "--out", tmp_path / "figure5.html")
    assert '<section id="cards">' in (tmp_path / "figure5.html").read_text()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The demo's network, trained for one step; then copies, one for each linearization.

    The training data are random numbers that do not depend on the text.
    """
    directory = tmp_path_factory.mktemp("linearized")
    (directory / "data" / "train").mkdir(parents=True)
    write_split(directory / "data" / "train", "train", 2, side=16, text_dim=64)
    run_d2i(
        *("train", "--recipe", "demo", "--data", directory / "data", "--run", directory / "hash"),
        *("--num-accelerators", 1, "--set", "train.num_steps=1"),
        *("--set", "train.global_batch_size=2"),
    )
    for strategy in ("space", "special", "letters"):
        shutil.copytree(directory / "hash", directory / strategy)
        config = json.loads((directory / strategy / "config.json").read_text())
        config["recipe"]["text"]["strategy"] = strategy
        config["recipe"]["train"]["seed"] = int(strategy == "letters")
        (directory / strategy / "config.json").write_text(json.dumps(config))
        (directory / strategy / "config.json.sha256").unlink()
    return {strategy: directory / strategy for strategy in TEMPLATES}


def test_table3_evaluates_one_run_per_linearization(
    tmp_path: Path, chat_data: Path, runs: dict[str, Path]
) -> None:
    few = ("--set", "sample.num_steps=1", "--workers", "0")
    given = [part for run in runs.values() for part in ("--run", run)]
    done = start("table3.py", chat_data, tmp_path / "three", *given, *few)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"warning: {runs['letters']} differs from {runs['hash']}: train.seed: 1" in done.stderr
    name = "demo network, fine-tuned on jsonl"
    table = tmp_path / "three/table3.csv"
    assert rows(table, f"Linearizations: {name}") == set(TEMPLATES)
    assert rows(table, "Linearizations, changed") == set()
    for strategy in TEMPLATES:
        card = json.loads((tmp_path / "three" / strategy / "scores.json").read_text())["card"]
        assert card["run"] == str(runs[strategy])
        assert card["text"]["strategy"] == card["trained_text"]["strategy"] == strategy
    # The printed command resumes in the same directory.
    settings = ("--set", "text.strategy=hash", "--set", "sample.num_steps=1")
    system = ("--system", f"run:{runs['hash']}")
    again = ("--data", chat_data, "--out", tmp_path / "three" / "hash", *settings)
    assert "23 of 23" in run_process("eval", *system, *again).stdout


@pytest.mark.soak
def test_table3_with_missing_runs_is_error_with_commands(
    tmp_path: Path, chat_data: Path, runs: dict[str, Path]
) -> None:
    out, few = tmp_path / "three", ("--set", "sample.num_steps=1", "--workers", "0")
    done = start("table3.py", chat_data, out, "--run", runs["space"], *few)
    assert done.returncode == 2
    *output, line = done.stderr.strip().splitlines()
    assert line.startswith("table3: got runs trained on space; expected one on each of hash, ")
    printed = [part.strip() for part in output if part.strip().startswith("d2i ")]
    # The data are prepared with hash; the other linearizations are encoded while training.
    assert len(printed) == 3 * 2
    for command in printed:
        parse_d2i(command)
    twice = start("table3.py", chat_data, out, "--run", runs["hash"], "--run", runs["hash"])
    assert twice.returncode == 2
    assert "were both trained on hash" in twice.stderr
    assert not out.exists()

    run("table3.py", chat_data, out, "--run", runs["space"], "--test-time-only", *few)
    table = "Linearizations, changed at test time only: demo network, fine-tuned on jsonl"
    assert rows(out / "table3.csv", table) == set(TEMPLATES)
    assert rows(out / "table3.csv", "Linearizations: ") == set()
    page = (out / "table3.html").read_text()
    assert "<title>Linearizations, changed at test time only</title>" in page
    assert "not the paper&#x27;s experiment" in page


def test_table3_help_lists_commands_of_its_runs() -> None:
    lines = [line.strip() for line in run("table3.py", "--help").splitlines()]
    for name in ("train", "eval"):
        commands = [line for line in lines if line.startswith(f"d2i {name} ")]
        assert len(commands) == len(TEMPLATES)
        for command in commands:
            parse_d2i(command)


def write_photochat(directory: Path, host: str, number: int) -> Path:
    """Write a test split with photos at a host; PhotoChat's real descriptions repeat."""
    descriptions = [*DESCRIPTIONS["descriptions"].values()]
    records = [
        {
            "dialogue": [
                {"message": f"look at {index}", "share_photo": False, "user_id": 0},
                {"message": "", "share_photo": True, "user_id": 0},
            ],
            "dialogue_id": index,
            "photo_description": descriptions[index % len(descriptions)],
            "photo_url": f"http://{host}/{index}.jpg",
        }
        for index in range(number)
    ]
    (directory / "test").mkdir(parents=True)
    (directory / "test" / "test_00.json").write_text(json.dumps(records))
    return directory


@pytest.mark.soak
def test_figure5_scores_photochat_categories(tmp_path: Path, chat_data: Path) -> None:
    number = 3 * len(DESCRIPTIONS["descriptions"])
    answers = {
        f"/{index}.jpg": sends(
            noise_image(size=(64 + index, 64)), 200, **{"Content-Type": "image/jpeg"}
        )
        for index in range(number)
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
    # Of the 26 descriptions 15 show people, 17 food, and 8 both.
    counts = {c["name"]: (c["num_instances"], c["num_draws"]) for c in document["categories"]}
    assert counts == {"people": (45, 1), "food": (51, 20)}
    assert document["num_in_two"] == 24
    food = document["categories"][1]
    assert food["fid"] > 0 < food["fid_std"]
    assert food["clip_i_interval"][0] < food["clip_i"] < food["clip_i_interval"][1] <= 100

    # An evaluation without categories.json is scored again from its stored features.
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
    assert set(found) == {"images", "FID", "IS", "paired KID", "CLIP-I"}
    assert float(found["FID"]["deviation"]) == food["fid_std"]
    assert found["FID"]["low"] == ""


def test_divter_and_minigpt5_programs(tmp_path: Path, chat_data: Path) -> None:
    save_random_describer(tmp_path / "base")
    output = run(
        *("divter.py", chat_data, tmp_path / "describer", "--base", tmp_path / "base"),
        *("--num-steps", 2),
    )
    assert output.startswith("trained on 12 descriptions")
    assert (tmp_path / "describer/model.safetensors").is_file()
    assert run("minigpt5.py", chat_data, tmp_path / "in").startswith("23 dialogs")
