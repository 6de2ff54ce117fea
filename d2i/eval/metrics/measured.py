"""All measurements of an evaluation, before scoring."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from d2i.eval.metrics.intervals import number_dialogs
from d2i.eval.metrics.negatives import Listed
from d2i.eval.metrics.retrieval_recall import retrieval_ranks

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Measured:
    """The arrays of all tasks of an evaluation, in the order of the data set.

    `keys`, `reasons`, `sources`, `is_flat`, `real_features`, `real_embeddings` and, with a text
    tower, `text_embeddings` have one row per instance; `features`, `embeddings` and, where the
    extractor has classes, `logits` have one row per generated image. `listed` are the negatives
    that a corpus lists, if the evaluation uses them.
    """

    arrays: Arrays
    listed: Listed | None = None

    @cached_property
    def generated(self) -> NDArray[np.int64]:
        """The indices of the instances that have a generated image."""
        return np.flatnonzero(self.arrays["reasons"] == "")

    @cached_property
    def dialogs(self) -> NDArray[np.int64]:
        """The number of each instance's dialog."""
        return number_dialogs(self.arrays["keys"].tolist())

    @cached_property
    def dialogs_of_generated(self) -> NDArray[np.int64]:
        """The number of each generated image's dialog."""
        return self.dialogs[self.generated]

    @cached_property
    def num_dialogs(self) -> int:
        """The number of dialogs with any generated image."""
        return len(np.unique(self.dialogs_of_generated))

    @property
    def failures(self) -> dict[str, int]:
        """The number of instances without an image, by reason."""
        reasons = self.arrays["reasons"]
        return dict(sorted(Counter(reasons[reasons != ""].tolist()).items()))

    @property
    def sources(self) -> list[str]:
        """The distinct sources of the images: `memory`, or format and size of their files."""
        return sorted(set(self.arrays["sources"][self.generated].tolist()))

    @cached_property
    def clip_i(self) -> NDArray[np.float64]:
        """100 times the cosine of each generated image to its reference image."""
        return _cosines(self.arrays["embeddings"], self.arrays["real_embeddings"][self.generated])

    @cached_property
    def clip_t(self) -> NDArray[np.float64] | None:
        """100 times the cosine of each generated image to its whole dialog."""
        text = self.arrays.get("text_embeddings")
        return None if text is None else _cosines(self.arrays["embeddings"], text[self.generated])

    @cached_property
    def ranks(self) -> NDArray[np.int64]:
        """The rank of each generated image's reference image among negatives."""
        return retrieval_ranks(
            self.arrays["keys"].tolist(),
            self.generated,
            self.arrays["embeddings"],
            self.arrays["real_embeddings"],
            self.listed.of_instances if self.listed else None,
        )


def to_float64(array: NDArray[Any]) -> NDArray[Any]:
    """Return floats as float64, and other arrays unchanged."""
    return array.astype(np.float64) if array.dtype.kind == "f" else array


def _cosines(rows: NDArray[Any], others: NDArray[Any]) -> NDArray[np.float64]:
    a, b = to_float64(rows), to_float64(others)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    found: NDArray[np.float64] = 100 * (a * b).sum(axis=1) / np.where(norms == 0, 1, norms)
    return found
