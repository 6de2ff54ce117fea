"""The page about your own chats: its examples are read, and its commands run."""

from __future__ import annotations

import re
import shlex
import subprocess
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from d2i.corpora import read_instances
from d2i.dialog import linearize
from tests.processes import COMMAND

PAGE = Path(__file__).parents[2] / "docs" / "own-chats.md"


def own_chats() -> list[str]:
    """Return the example of each chat format in docs/own-chats.md."""
    page = PAGE.read_text()
    return [block.strip() for block in re.findall(r"```json\n(.*?)```", page, re.DOTALL)]


def test_own_chats_page_examples_are_read(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("\n".join(own_chats()) + "\n")
    found = list(read_instances("jsonl", tmp_path, "train"))
    contexts = {linearize(instance.context, "letters") for instance in found}
    assert contexts == {"A: what did you see? B: this one"}
    kinds = [instance.image_ref.kind for instance in found]
    assert kinds == ["file", "urls", *["file"] * 4, "inline"]
    table = PAGE.read_text().partition("\n\n|")[2].partition("\n\n")[0]
    assert len(table.splitlines()) == len(found) + 2


# The demo's small networks replace the published ones, which tests do not have.
SMALL = {
    "preprocess": ("--workers", "0", "--set", "fetch.timeout_s=2"),
    "train": (
        *("--num-accelerators", "1", "--set", "train.num_steps=2"),
        *("--set", "train.global_batch_size=2", "--set", "train.micro_batch_size=2"),
    ),
    "eval": ("--set", "sample.num_steps=2", "--save-images", "all"),
    "sample": ("--set", "sample.num_steps=2"),
}


def small_command(line: str) -> list[str]:
    """Return the arguments of a documented command at the small size that the test runs."""
    words = shlex.split(line)[1:]
    if "--recipe" in words:
        words[words.index("--recipe") + 1] = "demo"
    if "--set" in words:
        at = words.index("--set")
        words[at : at + 2] = []
    return [*words, *SMALL.get(words[0], ())]


@pytest.mark.slow
def test_own_chats_page_runs_end_to_end(tmp_path: Path) -> None:
    """Every format on the page is prepared, trained on, generated and scored."""
    page = PAGE.read_text().partition("## One unsplit file")[0]
    chats = tmp_path / "chats"
    (chats / "photos").mkdir(parents=True)
    for name in ("train", "test"):
        (chats / f"{name}.jsonl").write_text("\n".join(own_chats()))
    (tmp_path / "chat.json").write_text(own_chats()[4])
    for number in range(1, 7):
        image = Image.effect_noise((64, 64), 9 * number).convert("RGB")
        image.save(chats / f"photos/{number}.jpg")
    for block in re.findall(r"```sh\n(.*?)```", page, re.DOTALL):
        for line in block.splitlines():
            done = subprocess.run(
                [*COMMAND, *small_command(line)],
                cwd=tmp_path,
                check=False,
                capture_output=True,
                text=True,
            )
            assert done.returncode == 0, f"{line}: {done.stderr}"
    generated = set()
    for path in (tmp_path / "scores/chats/images").glob("*.tar"):
        with tarfile.open(path) as tar:
            generated |= {name.partition("-")[2] for name in tar.getnames()}
    # The image of the second chat is a URL of example.org: a ledger row with a reason.
    assert generated == {f"a{number}-1-0.png" for number in (1, 3, 4, 5, 6, 7)}
    assert Image.open(tmp_path / "answer.png").text["text"] == "# what did you see? # this one"
    assert (tmp_path / "report.html").exists()
