"""What an evaluation has measured of all its images, before anything is scored.

Must not import torch.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from d2i.eval.intervals import number_dialogs
from d2i.eval.negatives import Listed
from d2i.eval.retrieval_recall import retrieval_ranks

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Measured:
    """What the tasks of an evaluation left, all together, in the order of the data set.

    `keys`, `reasons`, `sources`, `is_flat`, `real_features`, `real_embeddings` and, with a text
    tower, `text_embeddings` have a row an instance; `features`, `embeddings` and, where the
    extractor has classes, `logits` a row a drawn picture. `listed` are the negatives that a corpus
    lists, where they were asked for.
    """

    arrays: Arrays
    listed: Listed | None = None

    @cached_property
    def drawn(self) -> NDArray[np.int64]:
        """The indices of the instances that have a picture."""
        return np.flatnonzero(self.arrays["reasons"] == "")

    @cached_property
    def dialogs(self) -> NDArray[np.int64]:
        """The number of each instance's dialog."""
        return number_dialogs(self.arrays["keys"].tolist())

    @cached_property
    def dialogs_of_drawn(self) -> NDArray[np.int64]:
        """The number of each drawn picture's dialog."""
        return self.dialogs[self.drawn]

    @cached_property
    def num_dialogs(self) -> int:
        """Dialogs of which any picture was drawn."""
        return len(np.unique(self.dialogs_of_drawn))

    @property
    def failures(self) -> dict[str, int]:
        """Instances without a picture, by reason."""
        reasons = self.arrays["reasons"]
        return dict(sorted(Counter(reasons[reasons != ""].tolist()).items()))

    @property
    def sources(self) -> list[str]:
        """The distinct sources of the pictures: memory, or form and size of their files."""
        return sorted(set(self.arrays["sources"][self.drawn].tolist()))

    @cached_property
    def clip_i(self) -> NDArray[np.float64]:
        """100 times the cosine of each drawn picture to the true one."""
        return _cosines(self.arrays["embeddings"], self.arrays["real_embeddings"][self.drawn])

    @cached_property
    def clip_t(self) -> NDArray[np.float64] | None:
        """100 times the cosine of each drawn picture to its whole dialog."""
        text = self.arrays.get("text_embeddings")
        return None if text is None else _cosines(self.arrays["embeddings"], text[self.drawn])

    @cached_property
    def ranks(self) -> NDArray[np.int64]:
        """The rank of each drawn picture's true one among negatives."""
        return retrieval_ranks(
            self.arrays["keys"].tolist(),
            self.drawn,
            self.arrays["embeddings"],
            self.arrays["real_embeddings"],
            self.listed.of_instances if self.listed else None,
        )


def wide(array: NDArray[Any]) -> NDArray[Any]:
    """Return floats as float64, and what is none as it is."""
    return array.astype(np.float64) if array.dtype.kind == "f" else array


def _cosines(rows: NDArray[Any], others: NDArray[Any]) -> NDArray[np.float64]:
    a, b = wide(rows), wide(others)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    found: NDArray[np.float64] = 100 * (a * b).sum(axis=1) / np.where(norms == 0, 1, norms)
    return found
