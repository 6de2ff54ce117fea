"""The examples of docs/extending.md: corpus, family and form of chat go through every command."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

import d2i
from d2i.corpora import build_corpus, corpus_type, read_instances
from d2i.dialog import Turn
from d2i.errors import ConfigError
from tests.made_before import make

ROOT = Path(__file__).resolve().parents[2]
CORPUS = "forum:Forum"
PACKAGE = Path(d2i.__file__).parent
LINE = '    "conv": "d2i.models.conv",\n'
MAX_FILES, MAX_LINES = 5, 250
# The lines after which the page's entries for a metric belong.
PLACES = {"d2i/metric_specs.py": "_ROWS = (\n", "d2i/eval/metrics/scores.py": "    found |= {\n"}


def examples() -> dict[str, str]:
    """Return the page's Python by the name of the file, which is its first line."""
    page = (ROOT / "docs" / "extending.md").read_text()
    return dict(re.findall(r"```python\n# (\S+?)(?:, in \w+)?\n(.*?)```", page, re.DOTALL))


@pytest.fixture
def threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write the page's module, and chats in the form that it reads; one thread has no posts."""
    (tmp_path / "forum.py").write_text(examples()["forum.py"])
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


def test_own_form_of_chat_reads_as_turns_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "exported.py").write_text(examples()["exported.py"])
    monkeypatch.syspath_prepend(tmp_path)
    log = [{"user": "ann", "said": "Look!"}, {"user": "bob", "file": "a.jpg"}]
    lines = [json.dumps({"log": log}), json.dumps({"turns": []})]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    issues: list[Any] = []
    read = list(
        read_instances("exported:Exported", str(tmp_path), "train", on_problem=issues.append)
    )
    (instance,) = read
    assert instance.context == (Turn(0, "Look!"), Turn(1, ""))
    assert [issue.reason for issue in issues] == ["missing_field"]


@pytest.fixture
def extended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copy the package, and add the page's family and metric where the page says."""
    package = tmp_path / "package" / "d2i"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    files = {name: code for name, code in examples().items() if name.startswith("d2i/models/")}
    assert len(files) + 1 <= MAX_FILES
    assert sum(code.count("\n") for code in files.values()) <= MAX_LINES
    for name, code in files.items():
        (package.parent / name).parent.mkdir(exist_ok=True)
        (package.parent / name).write_text(code)
    page = (ROOT / "docs" / "extending.md").read_text()
    assert f"```\n{LINE}```" in page
    registry = package / "backbones.py"
    registry.write_text(registry.read_text().replace("FAMILIES = {\n", f"FAMILIES = {{\n{LINE}"))
    for name, place in PLACES.items():
        code = (package.parent / name).read_text()
        assert code.count(place) == 1
        (package.parent / name).write_text(code.replace(place, f"{place}{examples()[name]}"))
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    return tmp_path


def test_own_family_and_metric_go_through_every_command(extended: Path) -> None:
    make.write_chats(extended / "chats")
    network = {
        name: value
        for name, value in make.NETWORK.items()
        if name not in ("backbone.patch_size", "backbone.num_heads")
    }
    network |= {"backbone.name": "conv-s", "train.activation_checkpointing": "true"}
    words = make.commands()
    words["train"] = words["train"][: words["train"].index("--set")] + make.settings(network)
    printed = {name: run(extended, *line) for name, line in words.items()}
    assert printed["train"]["step"] == make.NETWORK["train.num_steps"]
    assert printed["eval"]["card"]["backbone"] == "conv-s"
    assert printed["eval"]["card"]["found"] == make.NUM_SAMPLES["test"]
    assert printed["eval"]["scores"]["clip_distance"] > 0
    run(extended, "report", "evaluation", "--out", "report.html")
    report = (extended / "report.html").read_text()
    assert "conv-s-shaped, 3 blocks of width 4" in report
    assert "CLIP distance" in report
    found = run(extended, "weights", "inspect", "run/ema.safetensors")
    assert found["backbone"] == "conv-s"
    refused = subprocess.run(
        [*make.COMMAND, *words["train"], "--set", "backbone.patch_size=2", "--run", "other"],
        cwd=extended,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert refused.returncode == 2
    assert "unknown override of conv-s 'patch_size'" in refused.stderr
