"""The scores equal torch-fidelity's published numbers, and wrong input is refused in one line."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from torch_fidelity.metric_kid import kid_features_to_metric

from d2i.errors import DataError
from d2i.eval.metrics.compute import compute_scores
from tests.shared import SHARED, needs_shared

DIRECTORY = SHARED / "golden"
FID, KID, IS = {"rel": 1e-5}, {"abs": 2e-6}, {"rel": 1e-9}
SEED = 1


def stored() -> dict[str, np.ndarray]:
    with np.load(DIRECTORY / "metrics.npz", allow_pickle=False) as archive:
        return dict(archive)


def case(name: str) -> dict[str, Any]:
    cases: dict[str, dict[str, Any]] = json.loads((DIRECTORY / "metrics.json").read_text())["cases"]
    return cases[name]


def features(n: int, d: int, *, second: bool) -> np.ndarray:
    """The formula of metrics.json `recipe.features`."""
    base = np.random.default_rng([SEED, 300000 + (20 if second else 10) + d])
    mix = np.random.default_rng([SEED, 300100 + d]).standard_normal((d, d)) / np.sqrt(d)
    found = base.standard_normal((n, d)) @ (0.5 * np.eye(d) + 0.5 * mix)
    if second:
        found = 1.1 * found + 0.15
    return np.abs(found).astype(np.float32)


def logits(n: int, classes: int, scale: float) -> np.ndarray:
    """The formula of metrics.json `recipe.logits`."""
    rng = np.random.default_rng([SEED, 300200 + n])
    found = (rng.standard_normal((n, classes)) * scale).astype(np.float32)
    found[:, : classes // 8] += np.float32(1.5)
    return found


def pairs(n: int = 4) -> np.ndarray:
    return np.eye(n, 8, dtype=np.float32)


@needs_shared
def test_metrics_of_stored_features_match_golden() -> None:
    given = stored()
    scores = compute_scores(
        given["small_features_1"],
        given["small_features_2"],
        None,
        given["clipi_real"],
        given["clipi_fake"],
        kid_subsets=20,
        kid_subset_size=100,
    )
    assert scores["fid"] == pytest.approx(float(given["small_fid"]), **FID)
    assert scores["kid"] == pytest.approx(float(given["small_kid_mean"]), **KID)
    assert scores["kid_std"] == pytest.approx(float(given["small_kid_std"]), **KID)
    assert scores["clip_i"] == pytest.approx(float(given["clipi_score_fp64"]), abs=1e-9)
    assert scores["is"] is None
    assert scores["is_std"] is None
    assert scores["kid_subset_size"] == 100


@needs_shared
def test_inception_score_of_stored_logits_matches_golden() -> None:
    given = stored()
    rows = given["small_logits"]
    clip = given["clipi_real"]
    scores = compute_scores(clip[:, :4], torch.tensor(clip).repeat(5, 1)[:, :4], rows, clip, clip)
    assert scores["is"] == pytest.approx(float(given["small_is_mean"]), **IS)
    assert scores["is_std"] == pytest.approx(float(given["small_is_std"]), **IS)
    assert scores["clip_i"] == pytest.approx(100.0)


@needs_shared
@pytest.mark.parametrize(
    "name", ["d64", pytest.param("d2048", marks=pytest.mark.soak), "d256_rank_deficient"]
)
def test_fid_and_kid_match_formula(name: str) -> None:
    golden = case(name)
    real = features(golden["n1"], golden["d"], second=False)
    fake = features(golden["n2"], golden["d"], second=True)
    for found, index in ((real, 0), (fake, 1)):
        assert found.mean(dtype=np.float64) == pytest.approx(
            golden["mean_of_all_features"][index], rel=1e-6
        )
        assert found[0, 0] == pytest.approx(golden["first"][index], rel=1e-6)
        assert found[-1, -1] == pytest.approx(golden["last"][index], rel=1e-6)
    scores = compute_scores(
        real,
        fake,
        None,
        pairs(),
        pairs(),
        kid_subsets=golden["kid_subsets"],
        kid_subset_size=golden["kid_subset_size"],
    )
    assert scores["fid"] == pytest.approx(golden["fid"], **FID)
    # Where a covariance has no full rank, the root of its product depends on how the linear algebra
    # library rounds eigenvalues of zero: that moves FID by more than 1e-8 between machines.
    assert scores["fid"] == pytest.approx(golden["fid_float64_symmetric"], rel=1e-7)
    assert scores["kid"] == pytest.approx(golden["kid_mean"], **KID)
    assert scores["kid"] == pytest.approx(golden["kid_mean_float64"], rel=1e-9)
    assert scores["kid_std"] == pytest.approx(golden["kid_std_float64"], rel=1e-9)


def random_sets(num: int, num_fake: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    dice = np.random.default_rng(0)
    mix = dice.standard_normal((width, width))
    return (
        np.abs(dice.standard_normal((num, width)) @ mix),
        1.1 * np.abs(dice.standard_normal((num_fake, width)) @ mix) + 0.15,
    )


@pytest.mark.parametrize(("num", "num_fake", "width"), [(90, 70, 20), (60, 50, 80), (40, 90, 64)])
def test_kid_matches_torch_fidelity(num: int, num_fake: int, width: int) -> None:
    """Its function in float64, on the same features: more rows than columns, fewer, and both."""
    real, fake = random_sets(num, num_fake, width)
    scores = compute_scores(
        real, fake, None, pairs(), pairs(), kid_subsets=7, kid_subset_size=33, seed=5
    )
    kid = kid_features_to_metric(
        torch.from_numpy(real),
        torch.from_numpy(fake),
        kid_subsets=7,
        kid_subset_size=33,
        rng_seed=5,
        verbose=False,
    )
    assert scores["kid"] == pytest.approx(kid["kernel_inception_distance_mean"], rel=1e-9)
    assert scores["kid_std"] == pytest.approx(kid["kernel_inception_distance_std"], rel=1e-9)


def test_kid_kernel_is_summed_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    real, fake = random_sets(50, 41, 6)
    whole = compute_scores(real, fake, None, pairs(), pairs(), kid_subset_size=30)
    monkeypatch.setattr("d2i.eval.metrics.kid._NUM_KERNEL_ROWS", 16)
    in_blocks = compute_scores(real, fake, None, pairs(), pairs(), kid_subset_size=30)
    assert in_blocks["kid"] == pytest.approx(whole["kid"], rel=1e-12)
    assert in_blocks["kid_std"] == pytest.approx(whole["kid_std"], rel=1e-12)


@needs_shared
@pytest.mark.parametrize("name", ["is_1008", "is_small_odd"])
def test_inception_score_matches_formula(name: str) -> None:
    golden = case(name)
    rows = logits(golden["n"], golden["classes"], golden["scale"])
    few = rows[:, :4]
    scores = compute_scores(few, few, rows, pairs(), pairs(), kid_subsets=1, kid_subset_size=10)
    assert scores["is"] == pytest.approx(golden["is_mean"], **IS)
    assert scores["is_std"] == pytest.approx(golden["is_std"], **IS)


def test_kid_subset_size_shrinks_for_few_images_with_warning() -> None:
    rng = np.random.default_rng(0)
    real, fake, rows = (rng.standard_normal((n, 4)) for n in (9, 7, 7))
    scores = compute_scores(real, fake, rows, rows, rows)
    assert scores["kid_subset_size"] == 7
    assert scores["is_splits"] == 7


def test_distance_of_equal_images_is_zero() -> None:
    rows = np.random.default_rng(0).standard_normal((12, 3))
    scores = compute_scores(rows, rows, rows, rows, rows)
    assert scores["fid"] == pytest.approx(0.0, abs=1e-6)
    assert scores["clip_i"] == pytest.approx(100.0)


GOOD = np.arange(24, dtype=np.float32).reshape(6, 4) ** 0.5 + np.eye(6, 4, dtype=np.float32)
BAD = np.where(np.arange(24).reshape(6, 4) == 13, np.nan, GOOD)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((BAD, GOOD, GOOD, GOOD, GOOD), r"real_features: 1 of 6 rows .* row 3"),
        ((GOOD, BAD, GOOD, GOOD, GOOD), r"^features: 1 of 6 rows"),
        ((GOOD, GOOD, BAD, GOOD, GOOD), r"^logits: 1 of 6 rows"),
        ((GOOD, GOOD, GOOD, GOOD, np.inf * GOOD), r"^embeddings: 6 of 6 rows"),
        ((GOOD, GOOD, GOOD, GOOD, 0 * GOOD), r"row 0 is all zero"),
        (
            (GOOD, GOOD[:, :3], None, GOOD, GOOD),
            "got width 3, expected 4 as for the reference images",
        ),
        ((GOOD, GOOD[:1], None, GOOD, GOOD), r"\(1, 4\), expected \(images, width\)"),
        ((GOOD, GOOD, GOOD[:5], GOOD, GOOD), r"logits: got 5 rows, expected 6"),
        ((GOOD, GOOD, GOOD, GOOD, GOOD[:5]), r"got 5 rows for 6 reference images"),
    ],
)
def test_invalid_metric_input_is_one_line_error(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        compute_scores(*arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
def test_overflowing_features_raise() -> None:
    with pytest.raises(DataError, match=r"^fid: "):
        compute_scores(1e200 * GOOD.astype(np.float64), -GOOD, None, GOOD, GOOD)
