"""95 % confidence intervals: how far a score would move on another test set of as many dialogs.

Dialogs are resampled, not instances: instances of one dialog resemble each other, and treating them
as independent would make an interval too narrow. All images of a dialog, reference and generated,
are kept or left out together.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from d2i.dialog import dialog_of_key

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]
Ends = tuple[float, float]
"""The low and the high end of an interval."""

NUM_RESAMPLES = 2000
_SEED = 2020
_NORMAL = NormalDist()
_Z_95 = _NORMAL.inv_cdf(0.975)
_MIN_DIALOGS = 2
_NUM_DRAWN_TOGETHER = 1 << 21
# Means that differ by less are equal, but were summed in another order.
_SAME = 1e-12


def number_dialogs(keys: Sequence[str]) -> Counts:
    """Return the number of the dialog, from 0, of each of N instances: (N,)."""
    numbers: dict[str, int] = {}
    found = [numbers.setdefault(dialog_of_key(key), len(numbers)) for key in keys]
    return np.array(found, np.int64)


def normal(value: float, deviation: float) -> Ends | None:
    """Return a score plus and minus 1.96 deviations; None unless these are finite and above 0."""
    if not (np.isfinite(deviation) and deviation > 0):
        return None
    return value - _Z_95 * deviation, value + _Z_95 * deviation


def total_deviation(contributions: Floats, dialogs: Counts) -> float:
    """Return the standard deviation of a sum over instances when whole dialogs are resampled.

    With first derivatives as contributions it is the infinitesimal jackknife over dialogs (Efron
    1982, section 6): the limit of a bootstrap over many dialogs.

    Args:
        contributions: (N,) the summand of each instance.
        dialogs: (N,) the number of each one's dialog.

    Returns:
        NaN where there is only one dialog.
    """
    totals = _sums(dialogs, contributions)
    if len(totals) < _MIN_DIALOGS:
        return float("nan")
    squares = ((totals - totals.mean()) ** 2).sum()
    return float(np.sqrt(len(totals) / (len(totals) - 1) * squares))


def wilson(hits: NDArray[np.bool_], dialogs: Counts) -> Ends:
    """Return Wilson's interval of a share (Wilson 1927), for the effective number of images.

    That number is M over the design effect (Kish 1965): the variance of the share over dialogs
    divided by that over as many independent images, as Franco et al. (2019) advise for clustered
    samples. It is clipped between M (no correlation within dialogs) and M^2 / sum of squared sizes
    (full correlation within dialogs). It is the latter where all images hit, or none, because the
    correlation cannot be estimated then.

    Args:
        hits: (M,) True where an image counts, M >= 1.
        dialogs: (M,) the number of each one's dialog.

    Returns:
        Low and high, shares from 0 to 1; the share of hits lies between them.
    """
    share, num = float(hits.mean()), _effective_number(hits, dialogs)
    shrunk = 1 + _Z_95**2 / num
    middle = (share + _Z_95**2 / (2 * num)) / shrunk
    half = _Z_95 * np.sqrt(share * (1 - share) / num + (_Z_95 / (2 * num)) ** 2) / shrunk
    # Rounding must not move an end past the share itself.
    return float(max(0, min(share, middle - half))), float(min(1, max(share, middle + half)))


def _effective_number(hits: NDArray[np.bool_], dialogs: Counts) -> float:
    sizes = _sums(dialogs, np.ones(len(hits)))
    fewest = len(hits) ** 2 / (sizes**2).sum()
    share = hits.mean()
    if share in (0, 1) or len(sizes) < _MIN_DIALOGS:
        return float(fewest)
    variance = total_deviation((hits - share) / len(hits), dialogs) ** 2
    if variance == 0:
        return float(len(hits))
    return float(np.clip(share * (1 - share) / variance, fewest, len(hits)))


def bca(values: Floats, dialogs: Counts) -> Ends | None:
    """Return the bias-corrected and accelerated interval of a mean over images (Efron 1987).

    Takes percentiles of `NUM_RESAMPLES` resamples of dialogs, shifted by the share of resamples
    below the mean (bias) and by the skewness of the jackknife over dialogs (acceleration). Both
    ends are percentiles of means, so they stay within the range of the values.

    Args:
        values: (M,) one value per image.
        dialogs: (M,) the number of each one's dialog.

    Returns:
        Low and high; None where there is only one dialog, or all dialogs have the same mean.
    """
    totals, sizes = _sums(dialogs, values), _sums(dialogs, np.ones(len(values)))
    if len(totals) < _MIN_DIALOGS:
        return None
    mean = float(totals.sum() / sizes.sum())
    left_out = (totals.sum() - totals) / (sizes.sum() - sizes)
    apart = left_out.mean() - left_out
    same = _SAME * max(1.0, float(np.abs(values).max()))
    if np.abs(apart).max() <= same:
        return None
    acceleration = (apart**3).sum() / (6 * (apart**2).sum() ** 1.5)
    means = _resampled_means(totals, sizes)
    below = ((means < mean - same).mean() + (means <= mean + same).mean()) / 2
    margin = 1 / (2 * NUM_RESAMPLES)
    bias = _NORMAL.inv_cdf(min(max(float(below), margin), 1 - margin))
    shares = [
        _NORMAL.cdf(bias + (bias + z) / (1 - acceleration * (bias + z))) for z in (-_Z_95, _Z_95)
    ]
    low, high = np.quantile(means, shares)
    return float(min(low, mean)), float(max(high, mean))


def _resampled_means(totals: Floats, sizes: Floats) -> Floats:
    """Return the mean over images of as many dialogs, resampled: (NUM_RESAMPLES,)."""
    generator = np.random.default_rng(_SEED)
    num, found = len(totals), []
    block = max(1, _NUM_DRAWN_TOGETHER // num)
    for start in range(0, NUM_RESAMPLES, block):
        drawn = generator.integers(num, size=(min(block, NUM_RESAMPLES - start), num))
        found.append(totals[drawn].sum(axis=1) / sizes[drawn].sum(axis=1))
    return np.concatenate(found)


def _sums(dialogs: Counts, values: Floats) -> Floats:
    """Sum the values of each dialog that has any: (G,)."""
    of_dialogs = np.unique(dialogs, return_inverse=True)[1]
    return np.bincount(of_dialogs, values).astype(np.float64)
