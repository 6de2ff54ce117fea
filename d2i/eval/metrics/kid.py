"""The kernel distance of two sets of features (KID): over random subsets, and over paired images.

Over subsets, the kernel of each pair of images is computed once and summed for all subsets at once.
The subsets are those that torch-fidelity draws from the same seed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]

_NUM_KERNEL_ROWS = 1024
_NUM_PAIRED_ROWS = 512
_MIN_DIALOGS = 2


@dataclass(frozen=True)
class PairedMmd:
    """Squared MMD of paired images, and its deviation: NaN with fewer than three dialogs."""

    value: float
    deviation: float


def choose_subsets(
    num_real: int, num_fake: int, num_subsets: int, subset_size: int, seed: int
) -> tuple[Counts, Counts]:
    """Draw subsets without replacement; in each, the reference images are drawn first.

    Returns:
        (S, num_real) and (S, num_fake), 1 for each image in a subset, else 0.
    """
    # numpy's legacy generator, so that these are the same subsets as in published KIDs.
    dice = np.random.RandomState(seed)
    real = np.zeros((num_subsets, num_real), np.int64)
    fake = np.zeros((num_subsets, num_fake), np.int64)
    for subset in range(num_subsets):
        real[subset, dice.choice(num_real, subset_size, replace=False)] = 1
        fake[subset, dice.choice(num_fake, subset_size, replace=False)] = 1
    return real, fake


def unbiased_mmd(real: Floats, fake: Floats, real_counts: Counts, fake_counts: Counts) -> Floats:
    """Return the squared MMD of the kernel (x'y / D + 1)^3 (Binkowski et al. 2018, section 4).

    Unbiased for independent sets: no image is paired with itself.

    Args:
        real: (N, D) features of the reference images.
        fake: (M, D) features of the generated images.
        real_counts: (R, N), the count of each reference image in each of R sets.
        fake_counts: (R, M), the same for the generated images.

    Returns:
        (R,), one value per set.
    """
    of_real = _mean_within(real, real_counts.astype(np.float64))
    of_fake = _mean_within(fake, fake_counts.astype(np.float64))
    of_both = _mean_between(real, fake, *(c.astype(np.float64) for c in (real_counts, fake_counts)))
    found: Floats = of_real + of_fake - 2 * of_both
    return found


def mmd_of_subsets(real: Floats, fake: Floats, real_counts: Counts, fake_counts: Counts) -> Floats:
    """Return the same as `unbiased_mmd`, set by set where that needs fewer kernel values."""
    num_pairs = int((real_counts.sum(axis=1) * fake_counts.sum(axis=1)).sum())
    if len(real) * len(fake) <= num_pairs:
        return unbiased_mmd(real, fake, real_counts, fake_counts)
    found = []
    for of_real, of_fake in zip(real_counts, fake_counts, strict=True):
        rows, others = np.flatnonzero(of_real), np.flatnonzero(of_fake)
        counts = of_real[rows][None], of_fake[others][None]
        found.append(unbiased_mmd(real[rows], fake[others], *counts)[0])
    return np.array(found)


def paired_mmd(real: Floats, fake: Floats, dialogs: Counts) -> PairedMmd | None:
    """Return the squared MMD of paired samples (Gretton et al. 2012, Lemma 6, equation 4).

    The mean of h(i, j) = k(x_i, x_j) + k(y_i, y_j) - k(x_i, y_j) - k(x_j, y_i) over all i and j of
    different dialogs, with the kernel of `unbiased_mmd`. Gretton et al. leave out i = j, as x_i and
    y_i depend on each other. So do all images of one dialog, so all pairs within a dialog are left
    out, in all four terms. Where each instance is its own dialog, both estimators are the same.
    Unbiased for independent dialogs, and so below 0 about as often as above where both
    distributions are equal.

    The deviation is the jackknife's over dialogs, which is not biased low (Efron and Stein 1981).

    Args:
        real: (M, D) features of the reference images.
        fake: (M, D) features of the generated images; row i belongs to row i above.
        dialogs: (M,) the number of each row's dialog, from 0.

    Returns:
        None where all images are of one dialog.
    """
    _, of_dialogs, sizes = np.unique(dialogs, return_inverse=True, return_counts=True)
    if len(sizes) < _MIN_DIALOGS:
        return None
    sums = np.bincount(of_dialogs, _paired_sums(real, fake, dialogs))
    num_pairs = len(real) ** 2 - (sizes**2).sum()
    value = float(sums.sum() / num_pairs)
    if len(sizes) == _MIN_DIALOGS:
        return PairedMmd(value, float("nan"))
    left_out = (sums.sum() - 2 * sums) / (num_pairs - 2 * sizes * (len(real) - sizes))
    variance = (len(sizes) - 1) / len(sizes) * ((left_out - left_out.mean()) ** 2).sum()
    return PairedMmd(value, float(np.sqrt(variance)))


def _paired_sums(real: Floats, fake: Floats, dialogs: Counts) -> Floats:
    """Sum h of each row over the rows of other dialogs: (M,)."""
    sums = np.zeros(len(real))
    for start in range(0, len(real), _NUM_PAIRED_ROWS):
        rows, others = slice(start, start + _NUM_PAIRED_ROWS), slice(start, None)
        found = _kernel(real[rows], real[others])
        found += _kernel(fake[rows], fake[others])
        found -= _kernel(real[rows], fake[others])
        found -= _kernel(fake[rows], real[others])
        found[dialogs[rows, None] == dialogs[others]] = 0
        sums[rows] += found.sum(axis=1)
        # h is symmetric: values right of the diagonal block stand for those below it, too.
        sums[start + len(found) :] += found[:, len(found) :].sum(axis=0)
    return sums


def _mean_within(rows: Floats, counts: Floats) -> Floats:
    """Return the mean kernel over the pairs of two different rows, for each set: (R,)."""
    totals = np.zeros(len(counts))
    for start in range(0, len(rows), _NUM_KERNEL_ROWS):
        stop = start + _NUM_KERNEL_ROWS
        kernel = _kernel(rows[start:stop], rows[start:])
        np.fill_diagonal(kernel, 0)
        # The kernel is symmetric: values right of the diagonal block stand for those below it, too.
        kernel[:, len(kernel) :] *= 2
        totals += ((counts[:, start:stop] @ kernel) * counts[:, start:]).sum(axis=1)
    pairs = counts.sum(axis=1) ** 2 - (counts**2).sum(axis=1)
    means: Floats = totals / np.maximum(pairs, 1)
    return means


def _mean_between(rows: Floats, others: Floats, counts: Floats, other_counts: Floats) -> Floats:
    """Return the mean kernel over all pairs from `rows` and `others`, for each set: (R,)."""
    totals = np.zeros(len(counts))
    for start in range(0, len(rows), _NUM_KERNEL_ROWS):
        block = slice(start, start + _NUM_KERNEL_ROWS)
        kernel = _kernel(rows[block], others)
        totals += ((counts[:, block] @ kernel) * other_counts).sum(axis=1)
    pairs = counts.sum(axis=1) * other_counts.sum(axis=1)
    means: Floats = totals / np.maximum(pairs, 1)
    return means


def _kernel(rows: Floats, others: Floats) -> Floats:
    kernel: Floats = rows @ others.T
    kernel /= rows.shape[1]
    kernel += 1
    # Two products: numpy's power is many times slower.
    square = kernel * kernel
    kernel *= square
    return kernel
