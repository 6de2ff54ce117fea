"""PhotoChat's labels of the categories people, food and animals, and the scores of each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from d2i.corpora import read_instances
from d2i.errors import DataError
from d2i.eval.metrics.category_scores import (
    DRAW_SIZE,
    NUM_DRAWS,
    CategoryScores,
    choose_keys,
    fid_of_few,
    inception_score,
    num_shared,
    read_label_words,
    score_categories,
    write_categories,
)
from d2i.eval.metrics.compute import compute_fid, compute_scores
from d2i.eval.metrics.kid import paired_mmd
from d2i.eval.metrics.scores import Measured
from d2i.shards import Sample, ShardReader, json_bytes, npy_bytes, write_manifest, write_shard
from tests.shared import SHARED, needs_shared

# The photo_description of some dialogs in PhotoChat's test files, by dialogue_id.
DESCRIPTIONS: dict[str, str] = json.loads(
    Path(__file__).with_name("photochat_descriptions.json").read_text()
)["descriptions"]
PEOPLE = {0, 1, 4, 5, 8, 9, 11, 13, 14, 160, 322, 995, 996, 998, 999}
FOOD = {0, 2, 3, 4, 5, 6, 9, 10, 12, 14, 160, 162, 167, 322, 720, 997, 998}


def write_corpus(directory: Path) -> Path:
    """Write a test split of PhotoChat with the real descriptions."""
    records: list[dict[str, Any]] = [
        {
            "dialogue": [
                {"message": "look", "share_photo": False, "user_id": 0},
                {"message": "", "share_photo": True, "user_id": 0},
            ],
            "dialogue_id": int(number),
            "photo_description": description,
            "photo_url": f"https://photos.example/{number}_o.jpg",
        }
        for number, description in DESCRIPTIONS.items()
    ]
    (directory / "test").mkdir(parents=True)
    (directory / "test" / "test_00.json").write_text(json.dumps(records))
    return directory


def of_category(source: Path, name: str) -> set[int]:
    """Return the ids of the dialogs of a test split that belong to a category."""
    words = read_label_words()[name]
    found = read_instances("photochat", source, "test", on_problem=lambda _: None, max_broken=0.0)
    return {int(instance.dialog_id) for instance in found if words & {*instance.labels}}


@pytest.mark.parametrize(("name", "expected"), [("people", PEOPLE), ("food", FOOD)])
def test_photochat_labels_select_category_dialogs(
    tmp_path: Path, name: str, expected: set[int]
) -> None:
    assert of_category(write_corpus(tmp_path), name) == expected


@needs_shared
def test_people_category_finds_real_photochat_dialogs() -> None:
    source = SHARED / "data" / "photochat"
    assert of_category(source, "people") == {8, 996}
    assert not of_category(source, "food") | of_category(source, "animals")


def test_label_words_of_paper_figure_1_have_a_category() -> None:
    words = read_label_words()
    assert {"Head", "Face", "Hair"} <= words["people"]
    assert "Drink" in words["food"]


WIDTH = 96
KEYS = [f"test-{number}-0-0" for number in range(120)]
MEMBERS = {"people": KEYS[:90], "food": KEYS[80:110], "animals": []}


def measured(failed: tuple[int, ...] = (), order: NDArray[np.int64] | None = None) -> Measured:
    """Random features of all instances; those in `failed` have no image."""
    generator = np.random.default_rng(5)
    real, fake, embeddings = (generator.normal(size=(len(KEYS), WIDTH)) for _ in range(3))
    logits = generator.normal(size=(len(KEYS), 20))
    order = np.arange(len(KEYS)) if order is None else order
    generated = np.array([index for index in order if index not in failed])
    reasons = np.array(["blocked" if index in failed else "" for index in order])
    return Measured(
        {
            "keys": np.array(KEYS)[order],
            "reasons": reasons,
            "real_features": real[order],
            "real_embeddings": embeddings[order],
            "features": fake[generated] + 0.5,
            "embeddings": embeddings[generated],
            "logits": logits[generated],
        }
    )


def test_fid_and_inception_score_of_few_match_torch_fidelity() -> None:
    arrays = measured().arrays
    real, fake, logits = (arrays[name][:50] for name in ("real_features", "features", "logits"))
    assert fid_of_few(real, fake) == pytest.approx(compute_fid(real, fake), rel=1e-6)
    scores = compute_scores(real, fake, logits, real, fake, is_splits=1)
    assert inception_score(logits) == pytest.approx(scores["is"], rel=1e-9)
    # A class probability that underflows in float64 still gives a finite score.
    assert np.isfinite(inception_score(np.array([[0.0, -2000.0], [0.0, -1900.0]])))


def test_choose_keys_is_seeded_and_without_replacement() -> None:
    draws = [choose_keys(KEYS, seed) for seed in range(NUM_DRAWS)]
    assert draws == [choose_keys(KEYS[::-1], seed) for seed in range(NUM_DRAWS)]
    assert {len(frozenset(draw)) for draw in draws} == {DRAW_SIZE}
    assert len({frozenset(draw) for draw in draws}) == NUM_DRAWS
    assert frozenset(KEYS).issubset(key for draw in draws for key in draw)
    assert sorted(choose_keys(KEYS[:7], 3)) == sorted(KEYS[:7])


def test_score_categories_uses_draws_or_whole_small_category() -> None:
    found = measured()
    people, food = score_categories(found, MEMBERS)
    assert (people.name, people.num_instances, people.num_draws) == ("people", 90, NUM_DRAWS)
    assert people.draw_size == DRAW_SIZE
    indices = [
        [KEYS.index(key) for key in choose_keys(KEYS[:90], seed)] for seed in range(NUM_DRAWS)
    ]
    real, fake = found.arrays["real_features"], found.arrays["features"]
    fids = [compute_fid(real[draw], fake[draw]) for draw in indices]
    assert people.fid == pytest.approx(np.mean(fids), rel=1e-6)
    assert people.fid_std == pytest.approx(np.std(fids), rel=1e-3)
    assert people.is_std is not None
    paired = paired_mmd(real[:90].astype(float), fake[:90].astype(float), np.arange(90))
    assert paired is not None
    assert people.kid_paired == pytest.approx(paired.value)
    assert (food.draw_size, food.num_draws, food.fid_std, food.is_std) == (30, 1, None, None)
    assert food.fid == pytest.approx(compute_fid(real[80:110], fake[80:110]), rel=1e-6)
    assert num_shared(MEMBERS) == 10


def test_score_categories_ignores_row_order() -> None:
    def values(scores: list[CategoryScores]) -> list[Any]:
        return [pytest.approx(s.fid) for s in scores] + [pytest.approx(s.is_std) for s in scores]

    order = np.random.default_rng(1).permutation(len(KEYS))
    one, other = (score_categories(measured((3, 4, 100), o), MEMBERS) for o in (None, order))
    assert values(one) == [s.fid for s in other] + [s.is_std for s in other]
    assert [(s.num_instances, s.num_pictures) for s in one] == [(90, 88), (30, 29)]


def test_category_with_one_generated_image_has_no_scores() -> None:
    (one,) = score_categories(measured(tuple(range(1, 90))), {"people": KEYS[:90]})
    assert (one.num_instances, one.num_pictures, one.fid, one.kid_paired) == (90, 1, None, None)


def test_clip_i_never_exceeds_100_by_rounding() -> None:
    # Each generated image is its reference image: rounding pushes some cosines past 1.
    assert measured().clip_i.max() > 100
    people = score_categories(measured(), MEMBERS)[0]
    assert people.clip_i is not None
    assert people.clip_i <= 100
    # Cosines that differ only by rounding have no interval.
    assert people.clip_i_interval is None


def test_write_categories_rejects_features_of_other_data(tmp_path: Path) -> None:
    moments = npy_bytes(np.zeros((8, 2, 2), np.float16))
    parts = {"json": json_bytes({"context": [], "labels": ["Dog"]}), "moments.npy": moments}
    write_shard([Sample("test-0-0-0", parts)], str(tmp_path), 0, failures={})
    write_manifest(str(tmp_path), {})
    reader = ShardReader(str(tmp_path))
    with pytest.raises(DataError, match="those of the 1 instances of"):
        write_categories(str(tmp_path), reader, measured().arrays)
    with pytest.raises(
        DataError, match=r"got measurements of 0 instances; .*; run `d2i eval` again"
    ):
        write_categories(str(tmp_path), reader)
