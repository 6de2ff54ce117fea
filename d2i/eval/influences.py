"""How much each image moves the Fréchet distance (FID) and the Inception Score: first derivatives.

That of FID by singular values, which stay exact where a covariance has no full rank. Must not
import torch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def fid_influences(real: Floats, fake: Floats) -> tuple[Floats, Floats]:
    """Say how much FID gains with the weight of each picture: (N,) and (M,), each of mean 0.

    The trace of the root of two covariances A'A and B'B is the nuclear norm of M = A B'. With the
    weight of row i, that norm grows by half of the i-th diagonal element of (M M')^(1/2).

    Args:
        real: (N, D) features of the true pictures, N >= 2.
        fake: (M, D) features of the generated pictures, M >= 2.
    """
    of_real, of_fake = _Gaussian.of(real), _Gaussian.of(fake)
    left, values, right = np.linalg.svd(of_real.root @ of_fake.root.T, full_matrices=False)
    shift = of_real.mean - of_fake.mean
    return (
        _influences(of_real, shift, of_fake.root.T @ right.T, values),
        _influences(of_fake, -shift, of_real.root.T @ left, values),
    )


def inception_influences(logits: Floats, num_splits: int, seed: int) -> Floats:
    """Say how much the Inception Score gains with the weight of each image: (M,), of mean 0.

    Within a split of mean class shares q the score is the exponential of the mean of KL(p_i, q);
    more weight for image i moves that mean by its KL(p_i, q) less the mean.

    Args:
        logits: (M, C) class logits before softmax.
        num_splits: Splits that the score is the mean over, at most M.
        seed: Of the permutation before the split, as torch-fidelity draws it.
    """
    num = len(logits)
    found = np.zeros(num)
    # Published scores are permuted by numpy's old generator: so that these are the same splits.
    order = np.random.RandomState(seed).permutation(num)
    for split in range(num_splits):
        rows = order[split * num // num_splits : (split + 1) * num // num_splits]
        of_images = divergences(logits[rows])
        mean = of_images.mean()
        found[rows] = num / (num_splits * len(rows)) * np.exp(mean) * (of_images - mean)
    return found


def divergences(logits: Floats) -> Floats:
    """KL of the class shares of each row to their mean: (n,)."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    logs = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    shares = np.exp(logs)
    means = shares.mean(axis=0)
    # A class that no image has a share in adds nothing.
    of_means = np.log(np.where(means > 0, means, 1))
    found: Floats = (shares * (logs - of_means)).sum(axis=1)
    return found


@dataclass(frozen=True)
class _Gaussian:
    """Mean and centred rows of features, and a root R: R'R is their covariance."""

    mean: Floats
    rows: Floats
    root: Floats

    @classmethod
    def of(cls, features: Floats) -> _Gaussian:
        mean: Floats = features.mean(axis=0)
        rows: Floats = features - mean
        root: Floats = rows / np.sqrt(len(rows) - 1)
        # Fewer rows than columns are their own root.
        if len(root) > root.shape[1]:
            root = np.asarray(np.linalg.qr(root, mode="r"))
        return cls(mean, rows, root)


def _influences(of: _Gaussian, shift: Floats, directions: Floats, values: Floats) -> Floats:
    num = len(of.rows)
    # Of M = U S V', the rows of A times B'V are those of U S: their squares over S are shared.
    along = of.rows @ directions
    is_shared = values > np.finfo(np.float64).eps * values[0]
    shared = num / (num - 1) * (along[:, is_shared] ** 2 @ (1 / values[is_shared]))
    spread = num / (num - 1) * (of.rows**2).sum(axis=1)
    found: Floats = 2 * of.rows @ shift + spread - spread.mean() - (shared - shared.mean())
    return found
