"""Retrieval recall: the rank of the reference image, by CLIP similarity to the generated one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from d2i.dialog import key_order_hash

NUM_NEGATIVES = 999
"""The number that MMDialog lists for each test dialog."""
_SEED = 2020
_NUM_ROWS = 256
_NONE = np.empty(0, np.int64)


def retrieval_ranks(
    keys: Sequence[str],
    generated: NDArray[np.int64],
    embeddings: NDArray[np.float32],
    real_embeddings: NDArray[np.float32],
    listed: Sequence[NDArray[np.int64]] | None = None,
    num_negatives: int = NUM_NEGATIVES,
) -> NDArray[np.int64]:
    """Rank the reference image by CLIP similarity to the generated one, among negatives.

    The negatives of an instance are reference images of others: those listed for it, filled up to
    `num_negatives` with instances drawn by the hash of its key. A copy of its own reference image
    is no negative. Any other image as near as the reference image counts as nearer, so that images
    that CLIP cannot distinguish do not raise the recall.

    Args:
        keys: N instance keys.
        generated: (M,) the indices of the instances that have a generated image.
        embeddings: (M, E) CLIP embeddings of the generated images.
        real_embeddings: (N, E) CLIP embeddings of the reference images.
        listed: For each of N instances the indices of its listed negatives; None without lists.
        num_negatives: Most negatives per instance; fewer where there are fewer instances.

    Returns:
        int64 (M,), 1 for the nearest.
    """
    fake, real = _unit(embeddings), _unit(real_embeddings)
    image_of = _number_images(real_embeddings)
    ranks = np.empty(len(generated), np.int64)
    for row, index in enumerate(generated.tolist()):
        if row % _NUM_ROWS == 0:
            similarities = fake[row : row + _NUM_ROWS] @ real.T
        given = _NONE if listed is None else listed[index]
        negatives = choose_negatives(keys[index], index, len(keys), num_negatives, given)
        negatives = negatives[image_of[negatives] != image_of[index]]
        similarity = similarities[row % _NUM_ROWS]
        ranks[row] = 1 + np.count_nonzero(similarity[negatives] >= similarity[index])
    return ranks


def _number_images(embeddings: NDArray[np.float32]) -> NDArray[np.int64]:
    """Return an image number for each embedding (N, E): copies share one number."""
    rows = np.ascontiguousarray(embeddings)
    as_bytes = rows.view(f"V{rows.itemsize * rows.shape[1]}").ravel()
    numbers: NDArray[np.int64] = np.unique(as_bytes, return_inverse=True)[1]
    return numbers


def choose_negatives(
    key: str,
    index: int,
    num_instances: int,
    num: int,
    listed: NDArray[np.int64] = _NONE,
) -> NDArray[np.int64]:
    """Choose at most `num` instances other than `index`, each once, in order.

    Listed ones are chosen first; the others are drawn by the hash of the key.
    """
    generator = np.random.Generator(np.random.Philox(key_order_hash(key, _SEED)))
    chosen = generator.choice(num_instances - 1, min(num, num_instances - 1), replace=False)
    others: NDArray[np.int64] = chosen + (chosen >= index)
    if len(listed):
        listed = np.unique(listed)[:num]
        unlisted = others[~np.isin(others, listed)]
        others = np.concatenate([listed, unlisted[: len(others) - len(listed)]])
    return np.sort(others)


def _unit(rows: NDArray[np.float32]) -> NDArray[np.float64]:
    wide = rows.astype(np.float64)
    norms = np.linalg.norm(wide, axis=1, keepdims=True)
    unit: NDArray[np.float64] = wide / np.where(norms == 0, 1, norms)
    return unit
