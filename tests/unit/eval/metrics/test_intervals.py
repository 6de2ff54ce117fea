"""Confidence intervals resample dialogs, cover the truth and stay in bounds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from d2i.dialog import dialog_of_key, make_key
from d2i.eval.metrics.intervals import bca, normal, number_dialogs, total_deviation, wilson
from d2i.eval.metrics.kid import paired_mmd, unbiased_mmd
from d2i.eval.metrics.measured import Measured
from d2i.eval.metrics.scores import score
from d2i.metric_specs import METRICS
from d2i.report.evaluation import read_evaluation


@given(st.text(), st.text(), st.integers(0, 99), st.integers(0, 99))
def test_dialog_of_key_strips_turn_and_image(
    split: str, dialog_id: str, turn: int, image: int
) -> None:
    key = make_key(split, dialog_id, turn, image)
    dialog = dialog_of_key(key)
    assert key == f"{dialog}-{turn}-{image}"
    assert dialog == dialog_of_key(make_key(split, dialog_id, turn + 1, 0))
    assert dialog != dialog_of_key(make_key(split, f"{dialog_id}-0", turn, image))


def test_number_dialogs_counts_foreign_key_as_own_dialog() -> None:
    keys = ["photo_1", "photo-1", "a-1-2", "a-1-3", "test-7-1-0", "test-7-4-0", "test-8-4-0"]
    assert number_dialogs(keys).tolist() == [0, 1, 2, 3, 4, 4, 5]


def clustered(
    rng: np.random.Generator, num_dialogs: int, correlation: float
) -> tuple[np.ndarray, np.ndarray]:
    """Values of 1 to 4 instances a dialog, with a correlation within dialogs; of mean 0."""
    dialogs = np.repeat(np.arange(num_dialogs), rng.integers(1, 5, num_dialogs))
    shared = rng.standard_normal(num_dialogs)[dialogs]
    own = rng.standard_normal(len(dialogs))
    return np.sqrt(correlation) * shared + np.sqrt(1 - correlation) * own, dialogs


@pytest.mark.parametrize("kind", ["normal", "bca", "wilson"])
def test_interval_covers_truth_over_dialogs_but_not_instances(kind: str) -> None:
    """400 test sets of 40 dialogs: 95 % cover the truth, give or take 4 by chance."""
    rng = np.random.default_rng(0)
    num_covered = np.zeros(2)
    truth = 0.5 if kind == "wilson" else 0.0
    for _ in range(400):
        values, dialogs = clustered(rng, 40, 0.7)
        for column, groups in enumerate((dialogs, np.arange(len(values)))):
            ends = interval(kind, values, groups)
            assert ends is not None
            num_covered[column] += ends[0] <= truth <= ends[1]
    over_dialogs, over_instances = num_covered / 400
    assert 0.91 <= over_dialogs <= 0.985
    assert over_instances < 0.87


def interval(kind: str, values: np.ndarray, dialogs: np.ndarray) -> tuple[float, float] | None:
    if kind == "wilson":
        return wilson(values < 0, dialogs)
    if kind == "bca":
        return bca(values, dialogs)
    mean = float(values.mean())
    return normal(mean, total_deviation((values - mean) / len(values), dialogs))


@pytest.mark.parametrize("share", [0.02, 0.1, 0.9])
def test_wilson_interval_covers_shares_near_0_and_1(share: float) -> None:
    rng = np.random.default_rng(1)
    dialogs = np.arange(60)
    ends = [wilson(rng.random(60) < share, dialogs) for _ in range(2000)]
    assert np.mean([low <= share <= high for low, high in ends]) == pytest.approx(0.95, abs=0.035)


def test_wilson_interval_of_independent_images_matches_formula() -> None:
    """Of 10 independent images all 10 hit: n / (n + z^2) to 1; 5 of 10: 23.7 to 76.3 %."""
    assert wilson(np.ones(10, bool), np.arange(10)) == pytest.approx((0.7225, 1), abs=1e-4)
    half = np.arange(10) < 5
    assert wilson(half, np.arange(10)) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    # Doubling every image within its dialog adds no evidence: the interval stays the same.
    doubled, dialogs = np.repeat(half, 2), np.repeat(np.arange(10), 2)
    assert wilson(doubled, dialogs) == pytest.approx(wilson(half, np.arange(10)), abs=0.01)


Groups = st.lists(st.integers(0, 6), min_size=1, max_size=30)


@given(Groups, st.data())
def test_wilson_interval_contains_share_and_lies_in_0_to_1(groups: list[int], data: Any) -> None:
    hits = np.array(data.draw(st.lists(st.booleans(), min_size=len(groups), max_size=len(groups))))
    low, high = wilson(hits, np.array(groups))
    assert 0 <= low <= hits.mean() <= high <= 1
    assert low < high


@settings(deadline=None, max_examples=60)
@given(Groups, st.data())
def test_bca_interval_contains_mean_and_lies_in_value_range(groups: list[int], data: Any) -> None:
    """Includes values that all lie at the bound except one far away."""
    values = data.draw(
        arrays.arrays(np.float64, len(groups), elements=st.sampled_from([-100.0, 3.5, 99.9, 100.0]))
    )
    ends = bca(values, np.array(groups))
    if ends is None:
        means = {values[np.array(groups) == group].mean() for group in groups}
        assert max(means) - min(means) < 1e-9 or len(set(groups)) == 1
        return
    tolerance = 1e-9
    assert values.min() - tolerance <= ends[0] <= values.mean() + tolerance
    assert values.mean() - tolerance <= ends[1] <= values.max() + tolerance


def test_bca_interval_of_skewed_values_is_skewed() -> None:
    """Nearly all at the bound: the interval reaches far down, and little up."""
    values = np.where(np.arange(50) % 10 == 0, 60.0, 99.9)
    ends = bca(values, np.arange(50))
    assert ends is not None
    assert values.mean() - ends[0] > 1.3 * (ends[1] - values.mean())


def dependent_pairs(rng: np.random.Generator, num: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw two sets from one distribution whose rows correlate at .9, as if of one scene."""
    scene, own = rng.standard_normal((2, num, 64))
    return 3 * np.abs(scene), 3 * np.abs(0.9 * scene + np.sqrt(1 - 0.9**2) * own)


def test_paired_kid_is_unbiased_where_kid_is_biased_by_pairs() -> None:
    rng = np.random.default_rng(0)
    num, one = 302, np.ones((1, 302), np.int64)
    sets = [dependent_pairs(rng, num) for _ in range(20)]
    usual = np.array([unbiased_mmd(real, fake, one, one)[0] for real, fake in sets])
    found = [paired_mmd(real, fake, np.arange(num)) for real, fake in sets]
    values = np.array([paired.value for paired in found if paired])
    error = values.std(ddof=1) / np.sqrt(len(values))
    assert usual.max() < 0
    assert abs(values.mean()) < 3 * error
    assert usual.mean() < -20 * error
    # The deviation is not too small: the truth, 0, is nearly always within the interval.
    num_covered = [abs(paired.value) < 1.96 * paired.deviation for paired in found if paired]
    assert sum(num_covered) >= 17


def test_paired_kid_excludes_pairs_within_dialog() -> None:
    """Compare with the plain sum over all pairs of rows."""
    rng = np.random.default_rng(0)
    real, fake = rng.standard_normal((2, 9, 4))
    dialogs = np.array([5, 5, 0, 1, 0, 5, 2, 2, 7])
    terms = [
        kernel(real[i], real[j]) + kernel(fake[i], fake[j])
        - kernel(real[i], fake[j]) - kernel(real[j], fake[i])
        for i in range(9) for j in range(9) if dialogs[i] != dialogs[j]
    ]  # fmt: skip
    found = paired_mmd(real, fake, dialogs)
    assert found is not None
    assert found.value == pytest.approx(np.mean(terms), rel=1e-12)
    left_out = []
    for dialog in set(dialogs.tolist()):
        rows = dialogs != dialog
        without = paired_mmd(real[rows], fake[rows], dialogs[rows])
        assert without is not None
        left_out.append(without.value)
    assert found.deviation == pytest.approx(np.sqrt(4 * np.var(left_out)), rel=1e-9)
    assert paired_mmd(real, fake, np.zeros(9, np.int64)) is None


def kernel(x: np.ndarray, y: np.ndarray) -> float:
    return float((x @ y / len(x) + 1) ** 3)


def test_paired_kid_is_equal_when_summed_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    real, fake = dependent_pairs(np.random.default_rng(0), 50)
    dialogs = np.arange(50) // 3
    whole = paired_mmd(real, fake, dialogs)
    monkeypatch.setattr("d2i.eval.metrics.kid._NUM_PAIRED_ROWS", 16)
    in_blocks = paired_mmd(real, fake, dialogs)
    assert whole is not None
    assert in_blocks is not None
    assert in_blocks.value == pytest.approx(whole.value, rel=1e-12)
    assert in_blocks.deviation == pytest.approx(whole.deviation, rel=1e-9)


def measured(num: int, *, size: int = 1, noise: float = 0.3, num_classes: int = 6) -> Measured:
    """Measure images near the reference images, with `size` instances a dialog."""
    rng = np.random.default_rng(num)
    real = {name: rng.normal(size=(num, 8)) for name in ("real_features", "real_embeddings")}
    near = {name: real[f"real_{name}"] + noise * rng.normal(size=(num, 8)) for name in FEATURES}
    logits = {"logits": 5 * rng.normal(size=(num, num_classes))}
    return Measured(
        {
            "keys": np.array([f"test-{n // size}-{n % size}-0" for n in range(num)]),
            "reasons": np.full(num, ""),
            "sources": np.full(num, "memory"),
            "is_flat": np.zeros(num, bool),
            **{name: rows.astype(np.float32) for name, rows in (real | near | logits).items()},
        }
    )


FEATURES = ("features", "embeddings")


@pytest.mark.parametrize("noise", [0.0, 1e-4, 0.3, 3.0])
@pytest.mark.parametrize(("num", "size"), [(3, 1), (4, 2), (12, 3), (24, 1), (60, 5), (7, 7)])
def test_every_interval_is_within_metric_bounds(num: int, size: int, noise: float) -> None:
    found = score(measured(num, size=size, noise=noise), resolution=8)
    assert set(found["intervals"]) <= {key for key, spec in METRICS.items() if spec.interval}
    for key, (low, high) in found["intervals"].items():
        lowest, highest = METRICS[key].bounds
        assert lowest <= low < high <= (6 if key == "is" else highest), key
        # FID of nearly equal sets is rounding error alone, which may be below 0.
        assert low - 1e-5 <= found["scores"][key] <= high + 1e-9, key


def test_repeated_images_in_dialog_do_not_narrow_intervals() -> None:
    """Repeating images adds no evidence: each dialog's second image is its first."""
    alone = measured(40)
    doubled = Measured(
        {name: np.repeat(rows, 2, axis=0) for name, rows in alone.arrays.items()}
        | {"keys": np.array([f"test-{n // 2}-{n % 2}-0" for n in range(80)])}
    )
    of_alone, of_doubled = (score(m, 8)["intervals"] for m in (alone, doubled))
    for key in ("fid", "clip_i", "fid_clip", "kid_paired"):
        assert np.diff(of_doubled[key]) == pytest.approx(np.diff(of_alone[key]), rel=0.1), key


def test_metrics_that_cannot_vary_are_not_scored() -> None:
    found = score(measured(3), resolution=8)
    for key in ("is", "is_std", "recall_5", "recall_10"):
        assert found["scores"][key] is None
        assert key not in found["intervals"]
    assert found["scores"]["recall_1"] is not None
    warnings = "\n".join(found["warnings"])
    assert "IS is not scored: each of 3 splits of 3 images has one image" in warnings
    assert "recall@5 and recall@10 not scored: with 2 negatives" in warnings
    assert "recall@1 by chance is 33 %" in warnings
    assert "FID on 3 images is noisy and biased" in warnings
    assert "its covariance has rank 2 of 8" in warnings
    assert "scores over 3 dialogs are unreliable" in warnings
    # One more image than splits, one more candidate than ranks: scores can vary.
    scores = score(measured(11), resolution=8)["scores"]
    assert scores["is"] is not None
    assert scores["recall_10"] is not None


def test_single_dialog_has_intervals_of_recall_only() -> None:
    found = score(measured(12, size=12), resolution=8)
    assert found["scores"]["kid_paired"] is None
    assert found["scores"]["num_dialogs"] == 1
    assert {key.partition("_")[0] for key in found["intervals"]} == {"recall"}
    assert "all images are of one dialog" in "\n".join(found["warnings"])


def test_equal_scores_have_no_interval_of_mean() -> None:
    found = score(measured(24, noise=0.0), resolution=8)
    assert found["scores"]["clip_i"] == pytest.approx(100)
    assert "clip_i" not in found["intervals"]
    # All are ranked first, but of another 24 dialogs some might not be.
    assert found["scores"]["recall_1"] == 100
    assert found["intervals"]["recall_1"][0] < 90


def test_scores_over_many_images_have_no_warnings() -> None:
    assert score(measured(2100, noise=1.0), resolution=8)["warnings"] == []


def test_backward_compatibility_drops_impossible_intervals(tmp_path: Path) -> None:
    intervals = {
        "fid": [8.0, 12.0],
        "kid": [-0.81, -0.35],
        "is": [1.0, 1.0],
        "clip_i": [70.0, 101.1],
        "recall_1": [-7.6, 27.6],
        "recall_10": [100.0, 100.0],
        "removed": [1.0, 2.0],
    }
    document = {"scores": dict.fromkeys(intervals, 10.0), "intervals": intervals, "card": {}}
    (tmp_path / "scores.json").write_text(json.dumps(document))
    found = read_evaluation(tmp_path)
    assert found.intervals == {"fid": [8.0, 12.0]}
    assert found.scores["kid"] == 10.0
