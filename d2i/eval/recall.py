"""Does a drawn picture point at the true one? Its rank among true pictures of other instances."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from d2i.dialog import key_order_hash

NUM_NEGATIVES = 999
"""As many as MMDialog lists for each test dialog; these are drawn by key hash instead."""
_SEED = 2020


def true_ranks(
    keys: Sequence[str],
    drawn: NDArray[np.int64],
    embeddings: NDArray[np.float32],
    real_embeddings: NDArray[np.float32],
    num_negatives: int = NUM_NEGATIVES,
) -> NDArray[np.int64]:
    """Rank the true picture by CLIP similarity to the drawn one, among negatives.

    The negatives of an instance are true pictures of others, drawn by the hash of its key. Another
    copy of the true picture is no negative; any other that is as near as the true one counts as
    nearer, so that nothing is won by pictures that CLIP cannot tell apart.

    Args:
        keys: N instance keys.
        drawn: (M,) the indices of the instances that have a drawn picture.
        embeddings: (M, E) CLIP embeddings of the drawn pictures.
        real_embeddings: (N, E) CLIP embeddings of the true pictures.
        num_negatives: At most so many; fewer where there are fewer instances.

    Returns:
        int64 (M,), 1 for the nearest.
    """
    fake, real = _unit(embeddings), _unit(real_embeddings)
    pictures = _numbered(real)
    ranks = np.empty(len(drawn), np.int64)
    for row, index in enumerate(drawn.tolist()):
        negatives = draw_negatives(keys[index], index, len(keys), num_negatives)
        others = negatives[pictures[negatives] != pictures[index]]
        similarity = real[others] @ fake[row]
        ranks[row] = 1 + np.count_nonzero(similarity >= real[index] @ fake[row])
    return ranks


def draw_negatives(key: str, index: int, num_instances: int, num: int) -> NDArray[np.int64]:
    """Draw at most `num` instances other than `index`, each once, by the hash of its key."""
    generator = np.random.Generator(np.random.Philox(key_order_hash(key, _SEED)))
    chosen = generator.choice(num_instances - 1, min(num, num_instances - 1), replace=False)
    others: NDArray[np.int64] = np.sort(chosen)
    return others + (others >= index)


def _numbered(rows: NDArray[np.float64]) -> NDArray[np.int64]:
    """Number the distinct rows: to compare a thousand of them number by number takes longer."""
    numbers: dict[bytes, int] = {}
    # Both zeros are one number.
    hashes = (hashlib.sha256(row + 0.0).digest() for row in rows)
    found = (numbers.setdefault(digest, len(numbers)) for digest in hashes)
    return np.fromiter(found, np.int64, len(rows))


def _unit(rows: NDArray[np.float32]) -> NDArray[np.float64]:
    wide = rows.astype(np.float64)
    norms = np.linalg.norm(wide, axis=1, keepdims=True)
    unit: NDArray[np.float64] = wide / np.where(norms == 0, 1, norms)
    return unit
