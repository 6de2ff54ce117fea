"""A wrong image root is one error; once it is fixed, the same command starts over."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
import zipfile
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from PIL import Image

from d2i.cli import main
from d2i.cluster import Session
from d2i.errors import DataError, NothingWrittenError
from d2i.preprocess.job import PreprocessRequest
from d2i.preprocess.job import preprocess as run_job
from d2i.preprocess.ledger import read_ledger
from d2i.recipes import resolve_recipe
from d2i.shards import read_commits, read_manifest, verify

NUM = 4
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:{:064}\nsize 123\n"


def write_corpus(directory: Path, *splits: str) -> str:
    for split in splits:
        (directory / split).mkdir(parents=True)
        lines = [
            {
                "conversation_id": number,
                "conversation": [
                    {"turn": [{"__TEXT__": f"see {number}"}, {"__MEDIA__": f"{split}-{number}"}]}
                ],
            }
            for number in range(NUM)
        ]
        path = directory / split / "conversations.json"
        path.write_text("\n".join(map(json.dumps, lines)))
    return str(directory)


def write_images(directory: Path, *splits: str, pointers: bool = False) -> Path:
    directory.mkdir(exist_ok=True)
    for split in splits:
        for number in range(NUM):
            path = directory / f"{split}-{number}.jpg"
            if pointers:
                path.write_text(LFS.format(number))
            else:
                pixels = np.random.default_rng(number).integers(0, 255, (64, 64, 3), np.uint8)
                Image.fromarray(pixels).save(path)
    return directory


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Run `d2i preprocess` in this process, which keeps its environment; return its exit code."""
    line = ["d2i", "preprocess", *map(str, arguments), "--recipe", "demo", "--workers", "0"]
    monkeypatch.setattr("sys.argv", line)
    with patch.dict(os.environ), pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def test_invalid_image_root_is_one_line_error_before_planning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source, out = write_corpus(tmp_path / "src", "test"), tmp_path / "out"
    with zipfile.ZipFile(tmp_path / "p.zip", "w") as archive:
        archive.writestr("test-0.jpg", b"")
    (tmp_path / "p.tar").write_bytes(b"")
    command = ("--corpus", "mmdialog", "--source", source, "--out", out)
    for name, said in (
        ("nowhere", "got nothing as the image root"),
        ("p.zip", "got a zip archive"),
        ("p.tar", "not an intact tar, but an empty file"),
    ):
        for extra in ((), ("--dry-run",)):
            root = f"corpus.image_root={tmp_path / name}"
            assert run(monkeypatch, *command, "--set", root, *extra) == 2
            error = capsys.readouterr().err.splitlines()[-1]
            assert error.startswith("error: ")
            assert said in error
    assert not list(out.rglob("*.parquet"))

    # Neither can the index of a valid tar be written to a cache directory that is a file.
    with tarfile.open(tmp_path / "p.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("test-0.jpg"), io.BytesIO())
    (tmp_path / "home").write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    root = f"corpus.image_root={tmp_path / 'p.tar'}"
    assert run(monkeypatch, *command, "--set", root) == 2
    assert "set XDG_CACHE_HOME to a writable directory" in capsys.readouterr().err
    assert not list(out.rglob("*.parquet"))


def test_split_without_samples_is_not_published_and_restarts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = write_corpus(tmp_path / "src", "test", "train"), tmp_path / "out"
    images = write_images(tmp_path / "p", "train")
    write_images(images, "test", pointers=True)
    command = (
        *("--corpus", "mmdialog", "--source", source, "--out", out, "--json"),
        *("--set", f"corpus.image_root={images}", "--set", "preprocess.num_samples_per_shard=3"),
    )
    for again in ((), ("--retry-failed",)):
        assert run(monkeypatch, *command, *again) == 1
        captured = capsys.readouterr()
        found = {s["split"]: s for s in json.loads(captured.out.splitlines()[-1])["splits"]}
        assert (found["train"]["num_written"], found["test"]["num_written"]) == (NUM, 0)
        assert found["test"]["failures"] == {"lfs_pointer": NUM}
        error = captured.err.splitlines()[-1]
        assert "test: 0 of 4 instances became a sample; most common reason: lfs_pointer" in error
        assert "run 'git lfs pull' there" in error
        assert read_manifest(str(out / "train")).num_samples == NUM
        assert not read_commits(str(out / "test"))
        assert {path.name for path in (out / "test").iterdir()} == {"plan", "ledger"}
        assert {row.status for row in read_ledger(str(out / "test"))} == {"passing"}

    write_images(images, "test")
    assert run(monkeypatch, *command) == 0
    assert verify(str(out / "test")).ok
    assert {row.reason for row in read_ledger(str(out / "test"))} == {"ok"}

    # Another image root is another plan; nothing of the first plan remains in its way.
    other, few = tmp_path / "other", tmp_path / "few"
    write_images(tmp_path / "wrong", "valid")
    recipe = resolve_recipe("demo", _settings(tmp_path / "wrong"))
    request = PreprocessRequest("mmdialog", source, str(few), recipe, split="test")
    with pytest.raises(NothingWrittenError, match=r"4 instances .* reason: missing_file"):
        run_job(request, Session(0), lambda _: None)
    assert {row.status for row in read_ledger(f"{few}/test")} == {"permanent"}
    root = f"corpus.image_root={write_images(other, 'test')}"
    fixed = ("--corpus", "mmdialog", "--source", source, "--out", few, "--split", "test")
    assert run(monkeypatch, *fixed, "--set", root) == 0
    assert read_manifest(f"{few}/test").num_samples == NUM
    assert len(read_ledger(f"{few}/test")) == NUM


def _settings(root: Path) -> list[str]:
    return [f"corpus.image_root={root}", "preprocess.num_samples_per_shard=1"]


@pytest.mark.parametrize("left", ["nothing", "an empty directory"])
def test_vanished_image_root_stops_job_without_missing_file_rows(tmp_path: Path, left: str) -> None:
    source, out = write_corpus(tmp_path / "src", "test"), tmp_path / "out"
    images = write_images(tmp_path / "p", "test")
    (images / "test-0.jpg").unlink()
    request = PreprocessRequest(
        "mmdialog", source, str(out), resolve_recipe("demo", _settings(images))
    )
    away = tmp_path / "away"

    def remove_image_root(_: object) -> None:
        if read_commits(str(out / "test")) and not away.exists():
            images.rename(away)
            if left == "an empty directory":
                images.mkdir()

    with pytest.raises(DataError, match=f"got {left} as the image root"):
        run_job(request, Session(0), remove_image_root)
    assert len(read_ledger(str(out / "test"))) < NUM
    shutil.rmtree(images, ignore_errors=True)
    away.rename(images)
    (summary,) = run_job(request, Session(0), lambda _: None)
    assert (summary.num_written, summary.failures) == (NUM - 1, {"missing_file": 1})
