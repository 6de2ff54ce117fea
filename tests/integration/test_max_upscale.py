"""`image.max_upscale`: images too small for the resolution are rows with a reason, by the CLI."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from d2i.cluster import Session
from d2i.errors import ConfigError
from d2i.preprocess.job import PreprocessRequest
from d2i.preprocess.job import preprocess as run_job
from d2i.preprocess.ledger import read_ledger
from d2i.recipes import resolve_recipe
from d2i.shards import read_commits, verify
from tests.integration.commands import preprocess
from tests.processes import run_process

SIDE = 96
LIMITED = ("--set", f"image.resolution={SIDE}", "--set", "image.max_upscale=1.5")


def write_chats(directory: Path, sizes: Mapping[str, tuple[int, int]]) -> Path:
    """Write a chat for each image, of noise in its size."""
    directory.mkdir()
    lines = []
    for name, size in sizes.items():
        Image.effect_noise(size, 60).convert("RGB").save(directory / name)
        turns = [{"text": f"show me {name}"}, {"text": "here", "images": [name]}]
        lines.append(json.dumps({"id": name, "turns": turns}))
    (directory / "train.jsonl").write_text("\n".join(lines))
    return directory


def request_of(source: Path, out: Path, *settings: str) -> PreprocessRequest:
    """Return the job of the commands here, with other settings."""
    recipe = resolve_recipe("demo", [*LIMITED[1::2], *settings])
    return PreprocessRequest("jsonl", str(source), str(out), recipe)


def reasons(data: Path) -> dict[str, str]:
    return {row.image: row.reason for row in read_ledger(str(data / "train"))}


def test_images_beyond_limit_are_failed_rows_and_exact_ratio_passes(tmp_path: Path) -> None:
    """PNGs are decoded in a child process, plain JPEGs in the worker."""
    sizes = {"a.jpg": (200, 64), "b.png": (64, 64), "c.jpg": (63, 300), "d.png": (300, 63)}
    source, out = write_chats(tmp_path / "chats", sizes), tmp_path / "out"
    assert preprocess("jsonl", source, out, *LIMITED)["train"]["failures"] == {"too_small": 2}
    failed = {"c.jpg": "too_small", "d.png": "too_small"}
    assert reasons(out) == {"a.jpg": "ok", "b.png": "ok"} | failed
    rows = {row.image: row for row in read_ledger(str(out / "train"))}
    assert rows["c.jpg"].status == "permanent"
    assert rows["c.jpg"].detail.startswith(
        "63x300 pixels: image.max_upscale=1.5 allows a resolution up to 94.5, got 96; "
    )
    with pytest.raises(ConfigError, match=r"recipe\.image\.max_upscale: 2\.0, expected 1\.5"):
        run_job(request_of(source, out, "image.max_upscale=2"), Session(0), lambda _: None)


def test_corpus_that_is_too_small_ends_with_setting_and_next_step(tmp_path: Path) -> None:
    sizes = {f"{number}.jpg": (48, 48) for number in range(3)}
    source, out = write_chats(tmp_path / "chats", sizes), tmp_path / "out"
    done = run_process(
        *("preprocess", "--corpus", "jsonl", "--source", source, "--out", out, *LIMITED),
        *("--recipe", "demo", "--workers", "0"),
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "error: train: 0 of 3 instances became a sample; most common reason: too_small (48x48 "
        "pixels: image.max_upscale=1.5 allows a resolution up to 72, got 96; give a lower --set "
        "image.resolution, or --set image.max_upscale=null to allow any); expected at least one; "
        "a split without samples is not published: fix the reason and repeat the command, which "
        "starts that split over"
    )
    assert not read_commits(str(out / "train"))
    for advice in ("image.max_upscale=null", "image.resolution=72"):
        other = tmp_path / advice
        run_job(request_of(source, other, advice), Session(0), lambda _: None)
        assert set(reasons(other).values()) == {"ok"}
    run_job(request_of(source, out, "image.max_upscale=null"), Session(0), lambda _: None)
    assert verify(str(out / "train")).ok


@pytest.mark.parametrize("limits", [("null", "1.5"), ("1.5", "null")])
def test_reused_data_is_that_of_new_limit(tmp_path: Path, limits: tuple[str, str]) -> None:
    source = write_chats(tmp_path / "chats", {"a.jpg": (64, 64), "b.jpg": (48, 64)})
    old, new = (
        request_of(source, tmp_path / name, f"image.max_upscale={limit}")
        for name, limit in zip(("old", "new"), limits, strict=True)
    )
    reusing = replace(new, out=str(tmp_path / "reusing"), reuse=old.out)
    run_job(old, Session(0), lambda _: None)
    for request in (new, reusing):
        run_job(request, Session(0), lambda _: None)
    expected = {"a.jpg": "ok", "b.jpg": "too_small" if limits[1] == "1.5" else "ok"}
    assert reasons(Path(new.out)) == reasons(Path(reusing.out)) == expected
    made, copied = (sorted(Path(r.out, "train").glob("*.tar")) for r in (new, reusing))
    assert [path.read_bytes() for path in made] == [path.read_bytes() for path in copied]
