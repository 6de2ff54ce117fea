"""Confidence intervals: how far a score would move with another draw of the test set.

Instances are drawn anew with replacement (Efron 1979), the true picture and the drawn one together.
An interval is the score plus and minus 1.96 times the deviation over resamples, not a pair of
percentiles: a resample holds fewer distinct pictures, which shifts FID and the Inception Score.
Of very many instances a part stands for all (`scores`).
Must not import torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]

NUM_RESAMPLES = 200
_Z_95 = 1.959963984540054
_NUM_KERNEL_ROWS = 1024


@dataclass(frozen=True)
class Resamples:
    """How often each instance is in each resample.

    Args:
        real: (R, N) over all instances.
        fake: (R, M) over those that have a drawn picture, in their order.
    """

    real: Counts
    fake: Counts


def draw_resamples(num_instances: int, drawn: Counts, seed: int = 2020) -> Resamples:
    """Draw `NUM_RESAMPLES` resamples; `drawn` (M,) are the indices that have a picture.

    Those without any of them, which few pictures make likely, say nothing and are left out.
    """
    generator = np.random.default_rng(seed)
    share = np.full(num_instances, 1 / num_instances)
    real = generator.multinomial(num_instances, share, size=NUM_RESAMPLES)
    real = real[real[:, drawn].any(axis=1)]
    return Resamples(real, real[:, drawn])


def intervals(
    scores: Mapping[str, float | int | None], deviations: Mapping[str, float]
) -> dict[str, list[float]]:
    """Give [low, high] of each score that has a deviation."""
    return {
        name: [value - _Z_95 * deviation, value + _Z_95 * deviation]
        for name, deviation in deviations.items()
        for value in [scores.get(name)]
        if value is not None and np.isfinite(deviation)
    }


def mean_deviation(values: Floats, resamples: Resamples) -> float:
    """Deviation of the mean of one value (M,) a drawn picture."""
    return _deviation(_weighted_means(values, resamples.fake))


def fid_deviation(real: Floats, fake: Floats, resamples: Resamples) -> float:
    """Deviation of the FID of features (N, D) and (M, D), to first order in the resampling.

    A decomposition for every resample would take longer than drawing the pictures may take.
    """
    of_real, of_fake = fid_influences(real, fake)
    return _deviation(
        _weighted_means(of_real, resamples.real) + _weighted_means(of_fake, resamples.fake)
    )


def fid_influences(real: Floats, fake: Floats) -> tuple[Floats, Floats]:
    """Say how much FID gains with the weight of each picture: (N,) and (M,), each of mean 0.

    The trace of the root of two covariances A'A and B'B is the nuclear norm of M = A B'. With the
    weight of row i, that norm grows by half of the i-th diagonal element of (M M')^(1/2).
    """
    (mean, centred, frame, root), (mean_2, centred_2, frame_2, root_2) = (
        _decomposed(real),
        _decomposed(fake),
    )
    left, values, right = np.linalg.svd(root @ root_2.T, full_matrices=False)
    shift = mean - mean_2
    return (
        _influences(centred, shift, frame, left, values),
        _influences(centred_2, -shift, frame_2, right.T, values),
    )


def kid_deviation(real: Floats, fake: Floats, resamples: Resamples) -> float:
    """Deviation of KID over all pictures: the unbiased estimate, no picture paired with itself."""
    of_real = _pair_means(real, real, resamples.real, resamples.real, is_same=True)
    of_fake = _pair_means(fake, fake, resamples.fake, resamples.fake, is_same=True)
    of_both = _pair_means(real, fake, resamples.real, resamples.fake, is_same=False)
    return _deviation(of_real + of_fake - 2 * of_both)


def inception_deviation(logits: Floats, resamples: Resamples, num_splits: int) -> float:
    """Deviation of the Inception Score of logits (M, C)."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    logs = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    shares = np.exp(logs)
    negentropy = (shares * logs).sum(axis=1)
    generator = np.random.default_rng(0)
    found = []
    for counts in resamples.fake:
        rows = generator.permutation(np.repeat(np.arange(len(counts)), counts))
        parts = [part for part in np.array_split(rows, num_splits) if len(part)]
        weights = np.stack([np.bincount(part, minlength=len(counts)) / len(part) for part in parts])
        means = weights @ shares
        with np.errstate(divide="ignore", invalid="ignore"):
            of_means = np.where(means > 0, means * np.log(means), 0).sum(axis=1)
        found.append(np.exp(weights @ negentropy - of_means).mean())
    return _deviation(found)


def _decomposed(rows: Floats) -> tuple[Floats, Floats, Floats | None, Floats]:
    """Give mean and centred rows, and a frame F and a root R with F R the rows over (n - 1)^(1/2).

    Where there are fewer rows than columns, the rows are their own root, and need no frame.
    """
    mean: Floats = rows.mean(axis=0)
    centred: Floats = rows - mean
    root: Floats = centred / np.sqrt(len(rows) - 1)
    if len(root) <= root.shape[1]:
        return mean, centred, None, root
    frame, root = np.linalg.qr(root)
    return mean, centred, frame, root


def _influences(
    centred: Floats, shift: Floats, frame: Floats | None, vectors: Floats, values: Floats
) -> Floats:
    directions = vectors if frame is None else frame @ vectors
    num = len(centred)
    shared = num * (directions**2 @ values)
    spread = num / (num - 1) * (centred**2).sum(axis=1)
    found: Floats = 2 * centred @ shift + spread - spread.mean() - (shared - shared.mean())
    return found


def _weighted_means(values: Floats, counts: Counts) -> Floats:
    totals = counts.sum(axis=1)
    means: Floats = counts @ values / np.maximum(totals, 1)
    return means


def _pair_means(
    rows: Floats, columns: Floats, row_counts: Counts, column_counts: Counts, *, is_same: bool
) -> Floats:
    """Mean kernel over pairs, for each resample: (R,)."""
    totals = np.zeros(len(row_counts))
    for start in range(0, len(rows), _NUM_KERNEL_ROWS):
        block = slice(start, start + _NUM_KERNEL_ROWS)
        kernel = (rows[block] @ columns.T / rows.shape[1] + 1) ** 3
        if is_same:
            place = np.arange(len(kernel))
            kernel[place, start + place] = 0
        totals += ((row_counts[:, block] @ kernel) * column_counts).sum(axis=1)
    pairs = row_counts.sum(axis=1) * column_counts.sum(axis=1)
    if is_same:
        pairs = pairs - (row_counts**2).sum(axis=1)
    means: Floats = totals / np.maximum(pairs, 1)
    return means


def _deviation(values: Floats | list[float]) -> float:
    return float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")
