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

from d2i.eval.influences import fid_influences

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]

NUM_RESAMPLES = 200
_Z_95 = 1.959963984540054


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
    return deviation(_weighted_means(values, resamples.fake))


def fid_deviation(real: Floats, fake: Floats, resamples: Resamples) -> float:
    """Deviation of the FID of features (N, D) and (M, D), to first order in the resampling.

    A decomposition for every resample would take longer than drawing the pictures may take.
    """
    of_real, of_fake = fid_influences(real, fake)
    return deviation(
        _weighted_means(of_real, resamples.real) + _weighted_means(of_fake, resamples.fake)
    )


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
    return deviation(found)


def _weighted_means(values: Floats, counts: Counts) -> Floats:
    totals = counts.sum(axis=1)
    means: Floats = counts @ values / np.maximum(totals, 1)
    return means


def deviation(values: Floats | list[float]) -> float:
    """Return how far one value a resample (R,) lies from their mean; NaN where there is but one."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")
