"""The programs of eval/ run as they are read: from prepared data to the tables."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

from tests.integration.networks import save_random_describer

ROOT = Path(__file__).resolve().parents[2]


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


def test_divter_and_minigpt5(tmp_path: Path, chat_data: Path) -> None:
    save_random_describer(tmp_path / "base")
    said = run(
        *("divter.py", chat_data, tmp_path / "describer", "--base", tmp_path / "base"),
        *("--num-steps", 2),
    )
    assert said.startswith("12 descriptions learned from")
    assert (tmp_path / "describer/model.safetensors").is_file()
    assert run("minigpt5.py", chat_data, tmp_path / "in").startswith("23 dialogs")
