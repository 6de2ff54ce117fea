"""Corpus survey of `d2i corpus`: counts, effects of options, leakage between splits."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from d2i.cli.app import app
from d2i.config import DialogConfig, apply_settings
from d2i.corpora import build_corpus, read_instances
from d2i.corpus_analysis import survey as survey_module
from d2i.corpus_analysis.leakage import Leak, LeakFinder, count_leaks
from d2i.corpus_analysis.perceptual_hash import (
    MAX_DISTANCE,
    HashIndex,
    PerceptualHash,
    perceptual_hash_of,
)
from d2i.corpus_analysis.survey import SplitSurvey, survey_split
from d2i.prompt_text import context_text
from d2i.tokenize import encode
from tests.processes import run_d2i, run_process
from tests.shared import SHARED, needs_shared

MMDIALOG = SHARED / "data" / "mmdialog"


def ignore_progress(*progress: object) -> None:
    """Ignore reported progress."""


def survey(
    source: Path, split: str, *settings: str, corpus: str = "mmdialog", num_sampled: int = 99
) -> SplitSurvey:
    config = apply_settings(DialogConfig(), settings)
    return survey_split(
        corpus, str(source), split, config, num_sampled=num_sampled, on_dialog=ignore_progress
    )


@needs_shared
@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_survey_counts_match_expected_counts(split: str) -> None:
    expected = json.loads((MMDIALOG / "EXPECTED.json").read_bytes())[split]
    found = survey(MMDIALOG, split)
    assert found.num_dialogs == expected["dialogs"]
    assert found.num_turns == expected["turns"]
    assert found.num_occurrences == expected["image_occurrences"]
    assert found.num_images == expected["unique_images"]


@needs_shared
@pytest.mark.parametrize("split", ["train", "valid", "test"])
@pytest.mark.parametrize("settings", [(), ("corpus.own_turn=exclude", "corpus.repeated=all")])
def test_variant_counts_match_reading_with_its_option(
    split: str, settings: tuple[str, ...]
) -> None:
    config = apply_settings(DialogConfig(), settings)
    found = survey(MMDIALOG, split, *settings)
    unmeasured = {
        "corpus.image_root",
        "corpus.descriptions",
        "corpus.max_broken",
        "text.latents",
        "text.encode",
        "text.format",
        "text.roles",
    }
    unmeasured |= {"corpus.split_shares", "corpus.split_seed"}
    every = {f"corpus.{name}" for name in type(config.corpus).model_fields}
    every |= {f"text.{name}" for name in type(config.text).model_fields}
    shown = {v.option if "." in v.option else f"corpus.{v.option}" for v in found.variants}
    assert shown == every - unmeasured - {"corpus.open_images_url"}
    for variant in found.variants:
        options, text = config.corpus.options(), config.text
        if variant.option.startswith("text."):
            text = text.model_copy(update={variant.option[5:]: variant.value})
        else:
            options[variant.option] = variant.value
        issues: list[Any] = []
        instances = list(
            read_instances("mmdialog", MMDIALOG, split, on_problem=issues.append, **options)
        )
        assert variant.num_instances == len(instances), variant
        assert variant.num_empty == sum(p.reason == "empty_context" for p in issues), variant
        # The sample has every occurrence, so it does not measure repeated images.
        if variant.option != "repeated":
            counts = [len(encode(context_text(i.context, text))) for i in instances]
            assert variant.mean_tokens == pytest.approx(np.mean(counts)), variant
            room = 75 * text.num_windows
            assert variant.share_over == pytest.approx(np.mean(np.array(counts) > room)), variant


@needs_shared
def test_length_histogram_has_bin_edge_at_window() -> None:
    found = survey(MMDIALOG, "test").lengths
    instances = read_instances("mmdialog", MMDIALOG, "test")
    counts = [len(encode(context_text(i.context, DialogConfig().text))) for i in instances]
    assert (found.num_sampled, found.longest, found.room) == (5, max(counts), 75)
    assert found.room % found.bin_width == 0
    assert sum(found.counts) == 5
    at_most_room = found.counts[: found.room // found.bin_width]
    assert sum(at_most_room) == sum(count <= 75 for count in counts)
    assert found.share_over == pytest.approx(sum(count > 75 for count in counts) / 5)


def write_chats(path: Path, *chats: tuple[str, list[str]]) -> None:
    """Write one line for each chat: a text, and the images that answer it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        for number, (text, images) in enumerate(chats):
            turns = [{"text": text}, {"text": "", "images": images}]
            file.write(json.dumps({"id": number, "turns": turns}) + "\n")


def test_survey_sample_is_deterministic_and_states_its_size(tmp_path: Path) -> None:
    write_chats(tmp_path / "train.jsonl", *((f"word {'x ' * n}", [f"{n}.jpg"]) for n in range(60)))
    whole = survey(tmp_path, "train", corpus="jsonl")
    part = survey(tmp_path, "train", corpus="jsonl", num_sampled=20)
    assert (whole.lengths.num_sampled, part.lengths.num_sampled) == (60, 20)
    assert part.num_instances == 60
    assert part == survey(tmp_path, "train", corpus="jsonl", num_sampled=20)
    assert whole.lengths.mean != part.lengths.mean
    assert survey(tmp_path, "train", corpus="jsonl", num_sampled=0).lengths.mean is None


@pytest.mark.parametrize("num_kept", [1, 7, 30])
def test_survey_sample_shrinks_to_character_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_kept: int
) -> None:
    """The first dialogs of the seeded order remain, as if that number had been requested."""
    chats = ((f"word {'x ' * n}".ljust(1000, "."), [f"{n}.jpg"]) for n in range(60))
    write_chats(tmp_path / "train.jsonl", *chats)
    expected = survey(tmp_path, "train", corpus="jsonl", num_sampled=num_kept)
    chars = num_kept * (1000 + 2 * survey_module._TURN_CHARS) + 999
    monkeypatch.setattr(survey_module, "_MAX_SAMPLE_CHARS", chars)
    assert survey(tmp_path, "train", corpus="jsonl") == expected
    assert expected.lengths.num_sampled == num_kept


def test_survey_does_not_count_dropped_turns(tmp_path: Path) -> None:
    turns = [{"text": "word " * 40}, {"text": "word " * 40}, {"text": "end", "images": ["a.jpg"]}]
    (tmp_path / "train.jsonl").write_text(json.dumps({"id": 1, "turns": turns}))
    found = {
        (v.option, v.value): (v.mean_tokens, v.share_over)
        for v in survey(tmp_path, "train", corpus="jsonl").variants
    }
    assert found["text.cut", "turn"] == (43, 0)
    assert found["text.max_turns", 1] == (2, 0)
    assert found["text.keep", "start"] == found["text.max_turns", 3] == (84, 1)
    cut = {v.option: v for v in survey(tmp_path, "train", "text.cut=turn", corpus="jsonl").variants}
    assert (cut["text.keep"].mean_tokens, cut["text.cut"].mean_tokens) == (41, 84)


def test_image_shared_very_often_is_reported(tmp_path: Path) -> None:
    write_chats(tmp_path / "train.jsonl", *((f"say {n}", ["same.jpg"]) for n in range(10_001)))
    corpus = ["corpus", "--corpus", "jsonl", "--source", tmp_path, "--no-pictures"]
    assert run_d2i(*corpus, "--json")["splits"]["train"]["most_occurrences"] == 10_001
    assert "one image is shared 10001 times" in run_process(*corpus, "--sample", "0").stdout


def test_survey_accepts_corpus_of_record_issues_only(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"id": 1}\n' * 500)
    found = survey(tmp_path, "train", corpus="jsonl")
    assert found.problems == {"missing_field": 500}
    assert (found.num_dialogs, found.num_instances, found.lengths.mean) == (0, 0, None)


def find_leaks(
    source: Path, splits: list[str], *, near_duplicates: bool, corpus: str = "jsonl"
) -> list[Leak]:
    finder = LeakFinder(
        build_corpus(corpus, {}),
        str(source),
        near_duplicates=near_duplicates,
        on_image=ignore_progress,
    )
    return list(finder.find(splits))


@needs_shared
def test_images_shared_between_splits_match_expected_leaks() -> None:
    leaks = find_leaks(
        MMDIALOG, ["train", "valid", "test"], near_duplicates=False, corpus="mmdialog"
    )
    assert {(leak.key, leak.other_split) for leak in leaks} == {
        ("train-0-0-0", "test"),
        ("train-4-0-0", "test"),
        ("train-1-0-0", "valid"),
    }
    shared = json.loads((MMDIALOG / "EXPECTED.json").read_bytes())["shared_between_splits"]
    counts = {f"{c['split']}&{c['other_split']}": c["num_images"] for c in count_leaks(iter(leaks))}
    assert counts == {pair: count for pair, count in shared.items() if count}


def scene(seed: int, side: int = 256) -> Image.Image:
    """Return a smooth image unique to the seed: a few blurred patches of colour."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    return coarse.resize((side, side), Image.Resampling.BICUBIC)


def save(image: Image.Image, path: Path, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)


def test_near_duplicates_are_found_across_splits(tmp_path: Path) -> None:
    save(scene(1), tmp_path / "p/test.png")
    save(scene(1, 180), tmp_path / "p/smaller.jpg", quality=40)
    save(scene(2), tmp_path / "p/other.png")
    red, green, blue = scene(1).split()
    save(Image.merge("RGB", (green, blue, red)), tmp_path / "p/recoloured.png")
    (tmp_path / "p/broken.jpg").write_bytes(b"\xff\xd8\xff no picture")
    names = ["smaller.jpg", "other.png", "recoloured.png", "broken.jpg", "missing.jpg", "test.png"]
    write_chats(tmp_path / "train.jsonl", *((name, [f"p/{name}"]) for name in names))
    write_chats(tmp_path / "test.jsonl", ("look", ["p/test.png"]))
    finder = LeakFinder(
        build_corpus("jsonl", {}), str(tmp_path), near_duplicates=True, on_image=ignore_progress
    )
    leaks = list(finder.find(["train", "test"]))
    assert [(leak.key, leak.reason) for leak in leaks] == [
        ("train-0-1-0", "near_duplicate"),
        ("train-5-1-0", "shared_image"),
    ]
    assert all(leak.other_key == "test-0-1-0" for leak in leaks)
    assert 0 <= leaks[0].distance <= MAX_DISTANCE
    assert finder.images["train"].num_read == 4
    assert finder.images["train"].failures == {"missing_file": 1, "not_an_image": 1}
    assert [
        leak.key for leak in find_leaks(tmp_path, ["train", "test"], near_duplicates=False)
    ] == ["train-5-1-0"]


def test_plain_image_has_no_perceptual_hash() -> None:
    assert perceptual_hash_of(Image.new("RGB", (64, 64), "red")) is None


@pytest.mark.parametrize("seed", range(8))
def test_perceptual_hash_survives_rescaling_and_recompression(seed: int) -> None:
    index = HashIndex()
    hashes = [perceptual_hash_of(scene(other)) for other in range(8)]
    for name, image_hash in enumerate(hashes):
        assert image_hash is not None
        index.add(str(name), image_hash)
    buffer = io.BytesIO()
    scene(seed, 200).save(buffer, "JPEG", quality=50)
    copied = perceptual_hash_of(Image.open(buffer).convert("RGB"))
    assert copied is not None
    found = index.nearest(copied)
    assert found is not None
    assert found[0] == str(seed)


STRUCTURE = st.integers(0, 2**64 - 1)


@given(st.lists(STRUCTURE, max_size=8), STRUCTURE, st.sets(st.integers(0, 63), max_size=6))
def test_hash_index_matches_exhaustive_search(
    structures: list[int], one: int, flipped: set[int]
) -> None:
    colours = np.zeros((4, 4, 3), np.uint8)
    structures = [*structures, one]
    query = one
    for bit in flipped:
        query ^= 1 << bit
    index = HashIndex()
    for position, structure in enumerate(structures):
        index.add(str(position), PerceptualHash(structure, colours))
    distances = [(structure ^ query).bit_count() for structure in structures]
    nearest = min(distances)
    found = index.nearest(PerceptualHash(query, colours))
    if nearest > MAX_DISTANCE:
        assert found is None
    else:
        assert found == (str(distances.index(nearest)), nearest)


def test_preprocess_excludes_leaks_found_by_corpus_command(tmp_path: Path) -> None:
    chats, leaks, page = tmp_path / "chats", tmp_path / "leaks.jsonl", tmp_path / "corpus.html"
    for number in range(4):
        save(scene(number), chats / f"p/{number}.png")
    write_chats(chats / "train.jsonl", *((f"say {n}", [f"p/{n}.png"]) for n in range(4)))
    write_chats(chats / "test.jsonl", ("look", ["p/2.png"]))
    corpus = ["--corpus", "jsonl", "--source", chats]
    found = run_d2i("corpus", *corpus, "--leaks", leaks, "--report", page, "--json")
    assert found["leaks"]["counts"] == [
        {
            "split": "train",
            "other_split": "test",
            "reason": "shared_image",
            "num_instances": 1,
            "num_images": 1,
        }
    ]
    assert found["splits"]["train"]["pictures"] == {"num_read": 4, "failures": {}}
    assert page.read_text().startswith("<!doctype html>")
    plan = [
        "--out",
        tmp_path / "out",
        "--recipe",
        "demo",
        "--dry-run",
        "--exclude",
        leaks,
        "--json",
    ]
    planned = run_d2i("preprocess", *corpus, *plan)
    assert planned["train"]["num_excluded"] == 1
    assert planned["train"]["num_instances"] == 3
    assert planned["test"]["num_instances"] == 1


def test_first_record_issue_of_each_reason_is_shown(tmp_path: Path) -> None:
    good = {"id": 0, "turns": [{"text": "a", "images": ["1.jpg"]}]}
    bad = [{"id": n, "turns": [{"text": "a", "images": ["/p/1.jpg"]}]} for n in (1, 2)]
    lines = map(json.dumps, [good, *bad, {"id": 3}])
    (tmp_path / "test.jsonl").write_text("\n".join(lines))
    page = tmp_path / "page.html"
    arguments = ("corpus", "--corpus", "jsonl", "--source", str(tmp_path), "--report", str(page))
    runner = CliRunner()
    text_result = runner.invoke(app, [*arguments, "--sample", "0"])
    json_result = runner.invoke(app, [*arguments, "--sample", "0", "--json"])
    found = json.loads(json_result.stdout)["splits"]["test"]
    assert found["problems"] == {"bad_image_ref": 2, "missing_field": 1}
    for reason, where, field in (
        ("bad_image_ref", "test.jsonl line 2", "turn 0 image 0: expected"),
        ("missing_field", "test.jsonl line 4", "turns: missing"),
    ):
        first = found["first_problems"][reason]
        assert first["where"] == where
        assert first["detail"].startswith(field)
        assert f"first {reason}: {where}: {first['detail']}" in text_result.stdout
        assert f"first: {where}: " in page.read_text()
