"""Parts of an evaluation: tasks, prompts, retrieval ranks and the intervals of scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch_fidelity.metric_fid import fid_statistics_to_metric

from d2i.dialog import key_order_hash
from d2i.errors import ConfigError, DataError
from d2i.eval.metrics.compute import compute_fid, compute_scores
from d2i.eval.metrics.influences import fid_influences, inception_influences
from d2i.eval.metrics.intervals import total_deviation
from d2i.eval.metrics.kid import paired_mmd
from d2i.eval.metrics.measured import Measured
from d2i.eval.metrics.retrieval_recall import choose_negatives, retrieval_ranks
from d2i.eval.metrics.scores import score
from d2i.eval.prompts import derangement
from d2i.eval.system import Generation
from d2i.eval.tasks import EvalTask, finished_tasks, plan_tasks, read_tasks, write_task


@pytest.mark.parametrize(("num", "width"), [(60, 5), (200, 40)])
def test_fid_influences_match_numerical_derivative(num: int, width: int) -> None:
    rng = np.random.default_rng(0)
    real = rng.standard_normal((num, width))
    fake = 1.3 * rng.standard_normal((num - 9, width)) + 0.2
    of_real, of_fake = fid_influences(real, fake)
    assert abs(of_real.mean()) + abs(of_fake.mean()) < 1e-10 * width
    more = 1e-5
    for row in (int(of_real.argmax()), int(of_real.argmin()), 3):
        changed = fid_of(moments(real, row, more), moments(fake, 0, 0.0))
        unchanged = fid_of(moments(real, row, -more), moments(fake, 0, 0.0))
        assert (changed - unchanged) / (2 * more) * num == pytest.approx(of_real[row], rel=1e-3)
    for row in (int(of_fake.argmax()), int(of_fake.argmin()), 3):
        changed = fid_of(moments(real, 0, 0.0), moments(fake, row, more))
        unchanged = fid_of(moments(real, 0, 0.0), moments(fake, row, -more))
        slope = (changed - unchanged) / (2 * more) * len(fake)
        assert slope == pytest.approx(of_fake[row], rel=1e-3)


def moments(rows: np.ndarray, row: int, more: float) -> dict[str, np.ndarray]:
    """Return mean and covariance, with a little more weight on one row."""
    weights = np.ones(len(rows))
    weights[row] += more
    mean = weights @ rows / weights.sum()
    scale = weights.sum() * (len(rows) - 1) / len(rows)
    return {"mu": mean, "sigma": (rows - mean).T @ (weights[:, None] * (rows - mean)) / scale}


def fid_of(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> float:
    found = fid_statistics_to_metric(first, second, verbose=False)
    return float(found["frechet_inception_distance"])


def test_score_deviations_match_fresh_test_sets() -> None:
    """FID, paired KID and IS vary over fresh test sets by about the predicted deviation."""
    rng = np.random.default_rng(0)
    num = 300

    def fresh() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        real, fake = rng.standard_normal((num, 4)), rng.standard_normal((num, 4)) + 0.8
        return real, fake, 2 * rng.standard_normal((num, 6))

    found: list[dict[str, Any]] = []
    for _ in range(60):
        real, fake, logits = fresh()
        scores = compute_scores(real, fake, logits, *[np.eye(num)] * 2, kid_subsets=1)
        paired = paired_mmd(real, fake, np.arange(num))
        assert paired is not None
        deviation = paired.deviation
        found.append(scores | {"kid_paired": paired.value})
    predicted = {
        "fid": fid_deviation(real, fake),
        "kid_paired": deviation,
        "is": total_deviation(inception_influences(logits, 10, 2020) / num, np.arange(num)),
    }
    for name, expected in predicted.items():
        fresh_deviation = np.std([scores[name] for scores in found], ddof=1)
        assert expected == pytest.approx(fresh_deviation, rel=0.3), name


def fid_deviation(real: np.ndarray, fake: np.ndarray) -> float:
    of_real, of_fake = fid_influences(real, fake)
    return total_deviation(of_real / len(real) + of_fake / len(fake), np.arange(len(real)))


@pytest.mark.parametrize(("num", "width"), [(120, 60), (60, 120)])
def test_fid_deviation_matches_fresh_test_sets(num: int, width: int) -> None:
    """Also with fewer images than dimensions, where covariances are rank-deficient."""
    rng = np.random.default_rng(0)
    scale = 1 / np.sqrt(1 + np.arange(width))

    def fresh() -> tuple[np.ndarray, np.ndarray]:
        real, fake = rng.standard_normal((2, num, width)) * scale
        return real, 1.2 * fake + 0.1

    expected = np.std([compute_fid(*fresh()) for _ in range(60)], ddof=1)
    assert fid_deviation(*fresh()) == pytest.approx(expected, rel=0.3)


@pytest.mark.parametrize("num_splits", [1, 7])
def test_inception_influences_match_numerical_derivative(num_splits: int) -> None:
    """Duplicating an image changes the score by its influence over the number of images."""
    logits = np.random.default_rng(0).standard_normal((2100, 5))
    found = inception_influences(logits, num_splits, 2020)
    assert found.mean() == pytest.approx(0, abs=1e-12)
    order = np.random.RandomState(2020).permutation(len(logits))
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)

    def inception(weights: np.ndarray) -> float:
        scores = []
        for rows in np.array_split(order, num_splits):
            of, share = weights[rows] / weights[rows].sum(), shares[rows]
            scores.append(np.exp(of @ (share * np.log(share / (of @ share))).sum(axis=1)))
        return float(np.mean(scores))

    weights = np.ones(len(logits))
    plain = compute_scores(logits, logits, logits, logits, logits, kid_subset_size=2,
                           is_splits=num_splits)["is"]  # fmt: skip
    assert inception(weights) == pytest.approx(plain, rel=1e-12)
    for row in (int(found.argmax()), int(found.argmin())):
        more = weights.copy()
        more[row] += 1e-4
        slope = (inception(more) - inception(weights)) / 1e-4
        assert slope * len(logits) == pytest.approx(found[row], rel=1e-3)


def test_intervals_of_subset_match_all_instances(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    num = 600
    measured = measured_of(num)
    of_all = score(measured, 256)
    monkeypatch.setattr("d2i.eval.metrics.scores._MAX_RESAMPLED", num // 2)
    of_part = score(measured, 256)
    found = {name: value for name, value in of_all["scores"].items() if value is not None}
    # Paired KID is computed on the subset, and its interval is wider.
    assert found.pop("kid_paired") == pytest.approx(of_part["scores"]["kid_paired"], rel=0.5)
    of_all["intervals"].pop("kid_paired")
    assert of_part["intervals"].pop("kid_paired")
    assert {name: of_part["scores"][name] for name in found} == pytest.approx(found, rel=1e-9)
    assert f"{num // 2} of {num} instances" in " ".join(of_part["warnings"])
    # Half of the features estimate a deviation to about 10 %.
    for name, (low, high) in of_all["intervals"].items():
        width = np.diff(of_part["intervals"][name])[0]
        assert width == pytest.approx(high - low, rel=0.3), name
    assert set(of_part["intervals"]) == set(of_all["intervals"])


def test_resampled_subset_keeps_whole_dialogs(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = measured_of(600, size=3)
    monkeypatch.setattr("d2i.eval.metrics.scores._MAX_RESAMPLED", 100)
    # 33 dialogs of three; the hundredth instance would belong to another dialog.
    assert "computed from 99 of 600 instances" in " ".join(score(measured, 256)["warnings"])


def measured_of(num: int, size: int = 1) -> Measured:
    """Random features of instances, `size` per dialog; one in ten has no image."""
    rng = np.random.default_rng(0)
    reasons = np.where(rng.random(num) < 0.1, "refused", "")
    num_generated = np.count_nonzero(reasons == "")
    real_embeddings = rng.standard_normal((num, 6))
    near = real_embeddings[reasons == ""]
    return Measured(
        {
            "keys": np.array([f"test-{number // size}-{number % size}-0" for number in range(num)]),
            "reasons": reasons,
            "sources": np.array(["memory"] * num),
            "is_flat": np.zeros(num, bool),
            "real_features": rng.standard_normal((num, 4)).astype(np.float32),
            "features": rng.standard_normal((num_generated, 4)).astype(np.float32) + 0.8,
            "logits": 2 * rng.standard_normal((num_generated, 6)).astype(np.float32),
            "real_embeddings": real_embeddings.astype(np.float32),
            "embeddings": (near + rng.standard_normal(near.shape)).astype(np.float32),
        }
    )


def test_retrieval_ranks_count_ties() -> None:
    real = np.array([[1, 0], [0, 1], [1, 0], [1, 1]], np.float32)
    keys = [f"test-{number}-0-0" for number in range(4)]
    generated = np.array([0, 1, 3])
    fake = np.array([[1, 0], [1, 0.1], [1, 1]], np.float32)
    # The third image is a copy of the first, so it is no negative of it.
    assert retrieval_ranks(keys, generated, fake, real).tolist() == [1, 4, 1]
    same = np.ones((3, 2), np.float32)
    # One image for all prompts: it is nearest to the last reference image only.
    assert retrieval_ranks(keys, generated, same, real).tolist() == [3, 4, 1]


@given(st.integers(2, 50), st.integers(1, 60), st.text("abc", min_size=1))
def test_choose_negatives_depends_only_on_key(num: int, wanted: int, key: str) -> None:
    index = key_order_hash(key, 1) % num
    found = choose_negatives(key, index, num, wanted)
    assert len(set(found.tolist())) == len(found) == min(wanted, num - 1)
    assert index not in found
    assert found.min() >= 0
    assert found.max() < num
    assert np.array_equal(found, choose_negatives(key, index, num, wanted))


@given(st.integers(2, 50), st.integers(1, 60), st.lists(st.integers(0, 49), max_size=60))
def test_choose_negatives_takes_listed_ones_first(num: int, wanted: int, listed: list[int]) -> None:
    given_ = np.array([index for index in listed if 0 < index < num], np.int64)
    found = choose_negatives("key", 0, num, wanted, given_).tolist()
    assert len(set(found)) == len(found) == min(wanted, num - 1)
    assert 0 not in found
    assert len(set(found) & set(given_.tolist())) == min(len(set(given_.tolist())), len(found))


def test_retrieval_ranks_among_listed_negatives() -> None:
    real = np.array([[1, 0], [0, 1], [0.9, 0.1], [0.8, 0.1]], np.float32)
    keys = [f"test-{number}-0-0" for number in range(4)]
    fake = np.array([[0.9, 0.1]], np.float32)
    listed = [np.array([1]), *[np.empty(0, np.int64)] * 3]
    generated = np.array([0])
    assert retrieval_ranks(keys, generated, fake, real, listed, num_negatives=1).tolist() == [1]
    assert retrieval_ranks(keys, generated, fake, real).tolist() == [3]


@given(st.lists(st.integers(0, 4), min_size=2, max_size=20))
def test_derangement_pairs_different_dialogs(dialogs: list[int]) -> None:
    keys = [f"test-{dialog}-{turn}-0" for turn, dialog in enumerate(dialogs)]
    if len(set(dialogs)) == 1:
        with pytest.raises(ConfigError, match="at least two, to swap contexts"):
            derangement(keys)
        return
    found = derangement(keys)
    assert all(dialogs[mine] != dialogs[theirs] for mine, theirs in enumerate(found))
    assert found == derangement(keys)


@given(st.integers(0, 60), st.lists(st.integers(1, 9), max_size=8), st.integers(1, 9))
def test_plan_tasks_covers_remaining_instances_once(num: int, sizes: list[int], size: int) -> None:
    finished, start = [], 0
    for index, length in enumerate(sizes):
        if index % 2 and start + length <= num:
            finished.append(EvalTask(start, start + length))
        start += length
    planned = plan_tasks(num, size, finished)
    covered = [index for task in (*finished, *planned) for index in task.indices]
    assert sorted(covered) == list(range(num))
    assert all(len(task.indices) <= size for task in planned)


def test_overlapping_finished_tasks_count_once(tmp_path: Path) -> None:
    """A worker that outlives its driver may finish tasks that were planned again."""
    for start, stop in ((0, 4), (2, 6), (4, 8), (4, 9)):
        write_task(str(tmp_path), EvalTask(start, stop), {"keys": np.arange(start, stop)})
    tasks = finished_tasks(str(tmp_path))
    assert tasks == [EvalTask(0, 4), EvalTask(4, 8)]
    assert read_tasks(str(tmp_path), tasks)["keys"].tolist() == list(range(8))
    assert plan_tasks(9, 3, tasks) == [EvalTask(8, 9)]


@pytest.mark.parametrize("cut", [0, 3, 200])
def test_damaged_task_is_one_line_error(tmp_path: Path, cut: int) -> None:
    write_task(str(tmp_path), EvalTask(0, 4), {"keys": np.arange(4)})
    (path,) = (tmp_path / "tasks").glob("*.npz")
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(DataError, match=r"00000004.npz is damaged.*; delete it and repeat"):
        read_tasks(str(tmp_path), finished_tasks(str(tmp_path)))


@pytest.mark.parametrize(
    ("generated", "message"),
    [
        ((None, ""), "neither an image nor a reason; expected an image, or a one-word"),
        ((np.zeros((2, 2, 3), np.uint8), "withheld"), "a system returned both"),
        ((np.zeros((2, 2, 3)), ""), r"returned float64 \(2, 2, 3\); expected uint8 \(H, W, 3\)"),
        ((np.zeros((3, 2, 2), np.uint8), ""), r"returned uint8 \(3, 2, 2\)"),
        ((np.zeros((2, 3), np.uint8), ""), r"returned uint8 \(2, 3\)"),
    ],
)
def test_generation_is_image_or_reason(generated: tuple[Any, str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Generation(*generated)
