"""How much each picture moves the Fréchet distance of two sets of features (FID).

By singular values, which stay exact where a covariance has no full rank. Must not import torch.
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
