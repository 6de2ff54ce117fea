"""The Fréchet distance of two sets of features (FID), and how much each picture moves it.

By singular values in float64, which stay exact where a covariance has no full rank; torch-fidelity
takes eigenvalues of a product of covariances, and agrees to 1e-6 of the FID. Must not import torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


class Frechet:
    """Two sets of features as Gaussians (Heusel et al. 2017, section 3).

    The trace of the root of two covariances A'A and B'B is the nuclear norm of M = A B'.

    Args:
        real: float64 (N, D), N >= 2.
        fake: float64 (M, D), M >= 2.
    """

    def __init__(self, real: Floats, fake: Floats) -> None:
        self._real, self._fake = _Gaussian.of(real), _Gaussian.of(fake)
        self._shift: Floats = self._real.mean - self._fake.mean

    @property
    def distance(self) -> float:
        """The squared distance, which is the FID.

        Raises:
            numpy.linalg.LinAlgError: If the features are so large that their covariance overflows.
        """
        values = self._decomposed[1]
        spread = self._real.spread + self._fake.spread
        return float(self._shift @ self._shift + spread - 2 * values.sum())

    @cached_property
    def influences(self) -> tuple[Floats, Floats]:
        """How much the FID gains with the weight of each picture: (N,) and (M,), each of mean 0.

        With the weight of row i of A, the nuclear norm of M grows by half of the i-th diagonal
        element of (M M')^(1/2).
        """
        left, values, right = self._decomposed
        return (
            _influences(self._real, self._shift, self._fake.root.T @ right.T, values),
            _influences(self._fake, -self._shift, self._real.root.T @ left, values),
        )

    @cached_property
    def _decomposed(self) -> tuple[Floats, Floats, Floats]:
        left, values, right = np.linalg.svd(
            self._real.root @ self._fake.root.T, full_matrices=False
        )
        return left, values, right


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

    @property
    def spread(self) -> float:
        """The trace of the covariance."""
        return float((self.root**2).sum())


def _influences(of: _Gaussian, shift: Floats, directions: Floats, values: Floats) -> Floats:
    num = len(of.rows)
    # Of M = U S V', the rows of A times B'V are those of U S: their squares over S are shared.
    along = of.rows @ directions
    is_shared = values > np.finfo(np.float64).eps * values[0]
    shared = num / (num - 1) * (along[:, is_shared] ** 2 @ (1 / values[is_shared]))
    spread = num / (num - 1) * (of.rows**2).sum(axis=1)
    found: Floats = 2 * of.rows @ shift + spread - spread.mean() - (shared - shared.mean())
    return found
