"""The demo corpus: held-out scenes stay out of training, and one seed gives one corpus."""

import io
import json
import random
import re
from pathlib import Path
from statistics import median

import pytest
from PIL import Image

from benchmarks.demo_weights.images import render
from benchmarks.demo_weights.train import clip_captions, reading_dialogs
from d2i.demo.corpus import write_corpus
from d2i.demo.dialogs import MAX_TURNS, caption, contexts, make_dialog
from d2i.demo.judge import attribute_accuracy, read_all
from d2i.demo.render import render_scene
from d2i.demo.scene import ATTRIBUTES, Scene, all_scenes, is_held_out, split_scenes
from d2i.dialog import Turn, linearize
from d2i.tokenize import encode

NUM_DIALOGS = 400


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("world") / "corpus"
    write_corpus(out, NUM_DIALOGS, seed=3)
    return out


def truths(corpus: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (corpus / "scenes.jsonl").read_text().splitlines()]


def scene_of(truth: dict[str, str]) -> Scene:
    return Scene(**{name: truth[name] for name in ATTRIBUTES})


def conversations(corpus: Path, split: str) -> list[dict[str, list[dict[str, list]]]]:
    lines = (corpus / split / "conversations.json").read_text().splitlines()
    return [json.loads(line) for line in lines]


def linearized(num_dialogs: int, seed: int) -> list[str]:
    rng, scenes = random.Random(seed), all_scenes()
    dialogs = [make_dialog(rng.choice(scenes), rng) for _ in range(num_dialogs)]
    return [linearize([Turn(None, t) for t in contexts(d)[0][0]]) for d in dialogs]


def test_split_scenes_holds_out_one_in_ten() -> None:
    open_scenes, held_out = split_scenes()
    assert len(open_scenes) + len(held_out) == len(all_scenes()) == 2160
    assert 0.08 < len(held_out) / 2160 < 0.12
    assert not set(open_scenes) & set(held_out)


def test_every_attribute_value_is_open_and_held_out() -> None:
    open_scenes, held_out = split_scenes()
    for name, values in ATTRIBUTES.items():
        assert {getattr(scene, name) for scene in open_scenes} == set(values)
        assert {getattr(scene, name) for scene in held_out} == set(values)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_held_out_scenes_are_in_test_split_only(tmp_path: Path, seed: int) -> None:
    write_corpus(tmp_path / "corpus", 120, seed)
    for truth in truths(tmp_path / "corpus"):
        assert is_held_out(scene_of(truth)) == (truth["split"] == "test")


@pytest.mark.soak
def test_held_out_scenes_are_absent_from_pretraining() -> None:
    """VAE, CLIP and backbone are trained only on `render` and on texts about its scenes."""
    images = render(1)
    assert len(images.scenes) == len(images.pixels_NCHW)
    assert not any(is_held_out(scene) for scene in images.scenes)
    for texts in (clip_captions(), reading_dialogs()):
        assert not any(is_held_out(scene) for scene in texts.scenes)
    # The images show their scenes, as read by the judge, which is not a trained model.
    some = range(0, len(images.scenes), 20)
    rendered = [Image.fromarray(images.pixels_NCHW[i].permute(1, 2, 0).numpy()) for i in some]
    shares = attribute_accuracy(read_all(rendered), [images.scenes[i] for i in some])
    assert min(shares.values()) > 0.97


def test_same_seed_writes_same_corpus_bytes(corpus: Path, tmp_path: Path) -> None:
    write_corpus(tmp_path / "again", NUM_DIALOGS, seed=3)
    first = {p.relative_to(corpus): p.read_bytes() for p in corpus.rglob("*") if p.is_file()}
    again = tmp_path / "again"
    assert first == {p.relative_to(again): p.read_bytes() for p in again.rglob("*") if p.is_file()}


def test_other_seed_writes_other_corpus(corpus: Path, tmp_path: Path) -> None:
    write_corpus(tmp_path / "other", 20, seed=4)
    keys = {truth["media_key"] for truth in truths(corpus)}
    assert not keys & {truth["media_key"] for truth in truths(tmp_path / "other")}


def test_corpus_has_mmdialog_layout(corpus: Path) -> None:
    for split in ("train", "valid", "test"):
        for number, dialog in enumerate(conversations(corpus, split)):
            assert dialog["conversation_id"] == number
            assert 3 <= len(dialog["conversation"]) <= MAX_TURNS
            for turn in dialog["conversation"]:
                kinds = [kind for item in turn["turn"] for kind in item]
                assert kinds in (["__TEXT__"], ["__TEXT__", "__MEDIA__"])


def test_media_keys_are_int64_and_match_scenes(corpus: Path) -> None:
    shown = [
        item["__MEDIA__"]
        for split in ("train", "valid", "test")
        for dialog in conversations(corpus, split)
        for turn in dialog["conversation"]
        for item in turn["turn"]
        if "__MEDIA__" in item
    ]
    assert sorted(shown) == sorted(truth["media_key"] for truth in truths(corpus))
    assert all(-(2**63) <= int(key) < 2**63 for key in shown)
    assert any(key.startswith("-") for key in shown)


def test_test_split_images_open_and_few_others_are_broken(corpus: Path) -> None:
    broken = []
    for truth in truths(corpus):
        path = corpus / truth["split"] / f"{truth['media_key']}.jpg"
        try:
            with Image.open(path) as image:
                image.load()
            assert image.size == (64, 64)
        except OSError:
            broken.append(truth["split"])
    assert "test" not in broken
    assert 0 < len(broken) < 0.05 * len(truths(corpus))


def test_render_scene_depends_on_scene_and_jitter() -> None:
    scene = all_scenes()[1234]
    assert render_scene(scene, 5).tobytes() == render_scene(scene, 5).tobytes()
    assert render_scene(scene, 5).tobytes() != render_scene(scene, 6).tobytes()


def test_corpus_jpeg_quality_is_95(corpus: Path) -> None:
    truth = next(t for t in truths(corpus) if t["split"] == "test")
    buffer = io.BytesIO()
    render_scene(scene_of(truth), int(truth["media_key"])).save(buffer, "JPEG", quality=95)
    assert (corpus / "test" / f"{truth['media_key']}.jpg").read_bytes() == buffer.getvalue()


def test_captions_of_different_scenes_differ() -> None:
    rng, scene_of_caption = random.Random(0), {}
    for scene in all_scenes() * 2:
        assert scene_of_caption.setdefault(caption(scene, rng), scene) == scene


def test_dialogs_fit_token_window() -> None:
    lengths = [len(encode(text)) for text in linearized(600, seed=1)]
    assert median(lengths) < 45
    assert sum(length <= 75 for length in lengths) / len(lengths) > 0.98


def test_about_a_third_of_dialogs_have_corrections() -> None:
    corrections = re.compile(r"# (no wait|sorry|actually|oh no|hm)\b")
    share = sum(bool(corrections.search(text)) for text in linearized(600, seed=2)) / 600
    assert 0.30 < share < 0.44


def test_second_scene_description_fits_token_window() -> None:
    rng, scenes = random.Random(7), all_scenes()
    for _ in range(300):
        first, second = rng.sample(scenes, 2)
        found = contexts(make_dialog(first, rng, second))
        assert [scene for _, scene in found] == [first, second]
        (before, _), (texts, _) = found
        second_text = linearize([Turn(None, text) for text in texts[len(before) + 1 :]])
        assert len(encode(second_text)) <= 75
