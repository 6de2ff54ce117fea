"""The example corpus of docs/extending.md goes through every command, named by its class."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from d2i.corpora import build_corpus, corpus_type
from d2i.errors import ConfigError
from tests.made_before import make

ROOT = Path(__file__).resolve().parents[2]
CORPUS = "forum:Forum"


@pytest.fixture
def threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write the page's module, and chats in the form that it reads; one thread has no posts."""
    page = (ROOT / "docs" / "extending.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (tmp_path / "forum.py").write_text(example)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    chats = tmp_path / "chats"
    make.write_chats(chats)
    for file in chats.glob("*.jsonl"):
        records = map(json.loads, file.read_text().splitlines())
        threads = [
            {"thread": number, "posts": [said["text"]], "photo": shared["images"][0]}
            for number, (said, shared) in enumerate(record["turns"] for record in records)
        ]
        threads.append({"thread": len(threads), "posts": [], "photo": "none.jpg"})
        file.write_text("".join(f"{json.dumps(thread)}\n" for thread in threads))
    return tmp_path


def run(directory: Path, *words: str) -> Any:
    done = subprocess.run(
        [*make.COMMAND, *words, "--json"], cwd=directory, stdout=subprocess.PIPE, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def test_own_corpus_goes_through_every_command(threads: Path) -> None:
    printed = {
        name: run(threads, *(CORPUS if word == "jsonl" else word for word in words))
        for name, words in make.commands().items()
    }
    surveyed = printed["corpus"]
    assert surveyed["licence"] == "Our own forum: for research within the company."
    assert surveyed["splits"]["test"]["problems"] == {"missing_field": 1}
    splits = {split["split"]: split for split in printed["preprocess"]["splits"]}
    assert splits["test"]["num_written"] == make.NUM_SAMPLES["test"]
    assert splits["test"]["failures"] == {"missing_file": 1}
    assert splits["train"]["num_written"] == make.NUM_SAMPLES["train"]
    assert printed["eval"]["card"]["corpus"] == CORPUS
    assert printed["eval"]["card"]["found"] == make.NUM_SAMPLES["test"]
    assert printed["verify"]["problems"] == []
    run(threads, "report", "evaluation", "--out", "report.html")
    assert f"Systems on {CORPUS}" in (threads / "report.html").read_text()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("forums", "expected mmdialog, photochat, jsonl or your own as package.module:Class"),
        ("no_such_module:Forum", "No module named"),
        ("forum:Thread", "expected a subclass of d2i.corpora.Corpus"),
        ("forum:Missing", "has no attribute"),
    ],
)
@pytest.mark.usefixtures("threads")
def test_unknown_corpus_is_named(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        corpus_type(name)


@pytest.mark.usefixtures("threads")
def test_own_corpus_has_the_common_options() -> None:
    assert build_corpus(CORPUS, {"direction": "first"}).direction == "first"
    with pytest.raises(ConfigError, match="no option 'split_shares'"):
        build_corpus(CORPUS, {"split_shares": "1,0,0"})
