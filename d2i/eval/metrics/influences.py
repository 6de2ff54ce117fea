"""Influence of each image on the Fréchet distance (FID) and Inception Score: first derivatives.

FID's derivatives use singular values, which stay exact where a covariance lacks full rank. Must not
import torch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def fid_influences(real: Floats, fake: Floats) -> tuple[Floats, Floats]:
    """Return the derivative of FID by the weight of each image: (N,) and (M,), each of mean 0.

    For covariances A'A and B'B, the trace of the square root of their product is the nuclear norm
    of M = A B'. Its derivative by the weight of row i is half of the i-th diagonal element of
    (M M')^(1/2).

    Args:
        real: (N, D) features of the reference images, N >= 2.
        fake: (M, D) features of the generated images, M >= 2.
    """
    of_real, of_fake = _Gaussian.of(real), _Gaussian.of(fake)
    left, values, right = np.linalg.svd(of_real.root @ of_fake.root.T, full_matrices=False)
    shift = of_real.mean - of_fake.mean
    return (
        _influences(of_real, shift, of_fake.root.T @ right.T, values),
        _influences(of_fake, -shift, of_real.root.T @ left, values),
    )


def inception_influences(logits: Floats, num_splits: int, seed: int) -> Floats:
    """Return the derivative of the Inception Score by the weight of each image: (M,), of mean 0.

    Within a split with mean class shares q, the score is the exponential of the mean KL(p_i, q);
    more weight for image i moves that mean by KL(p_i, q) minus the mean.

    Args:
        logits: (M, C) class logits before softmax.
        num_splits: Splits that the score is the mean over, at most M.
        seed: Seed of the permutation before the split, as in torch-fidelity.
    """
    num = len(logits)
    found = np.zeros(num)
    # numpy's legacy generator, so that these are the same splits as in published scores.
    order = np.random.RandomState(seed).permutation(num)
    for split in range(num_splits):
        rows = order[split * num // num_splits : (split + 1) * num // num_splits]
        of_images = divergences(logits[rows])
        mean = of_images.mean()
        found[rows] = num / (num_splits * len(rows)) * np.exp(mean) * (of_images - mean)
    return found


def divergences(logits: Floats) -> Floats:
    """Return the KL divergence of each row's class shares from their mean: (n,)."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    logs = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    shares = np.exp(logs)
    means = shares.mean(axis=0)
    # A class whose share is 0 in all images adds nothing.
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
        # With no more rows than columns, QR would not make the root smaller.
        if len(root) > root.shape[1]:
            root = np.asarray(np.linalg.qr(root, mode="r"))
        return cls(mean, rows, root)


def _influences(of: _Gaussian, shift: Floats, directions: Floats, values: Floats) -> Floats:
    num = len(of.rows)
    # With M = U S V', A B'V is U S: its squares over S sum to the diagonal of (M M')^(1/2).
    along = of.rows @ directions
    is_shared = values > np.finfo(np.float64).eps * values[0]
    shared = num / (num - 1) * (along[:, is_shared] ** 2 @ (1 / values[is_shared]))
    spread = num / (num - 1) * (of.rows**2).sum(axis=1)
    found: Floats = 2 * of.rows @ shift + spread - spread.mean() - (shared - shared.mean())
    return found
