"""Negative candidates for retrieval recall, as a corpus lists them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from d2i.corpora import Corpus
from d2i.dialog import ImageRef
from d2i.errors import DataError
from d2i.eval.metrics.retrieval_recall import NUM_NEGATIVES
from d2i.shards import ShardReader


@dataclass(frozen=True)
class Listed:
    """Negatives that a corpus lists.

    Args:
        source: The corpus they were read from.
        of_instances: For each instance int64 (K,), the instances whose reference images are its
            negatives: those that are in the data set, at most 999.
    """

    source: str
    of_instances: Sequence[NDArray[np.int64]]

    @property
    def mean_number(self) -> float:
        """Mean number of listed negatives per instance."""
        return float(np.mean([len(listed) for listed in self.of_instances]))


def find_negatives(reader: ShardReader, corpus: Corpus, source: str) -> Listed:
    """Find the negatives that a corpus lists for the dialogs of a data set.

    Args:
        reader: The data set.
        corpus: The corpus that it was prepared from.
        source: Path or URL of that corpus.

    Raises:
        ConfigError: If the corpus lists no negatives.
        DataError: If the source has no such split, or lists no image of the data set.
    """
    samples = [reader.read_json(index) for index in range(len(reader))]
    places: dict[str, int] = {}
    for index, sample in enumerate(samples):
        image = corpus.image_id(ImageRef("file", tuple(sample["source"]["ref"])))
        places.setdefault(image, index)
    dialogs = {str(sample["dialog_id"]) for sample in samples}
    none = np.empty(0, np.int64)
    of_dialogs = {
        dialog: np.array([places[name] for name in names if name in places], np.int64)
        for dialog, names in corpus.negatives(source, samples[0]["split"])
        if dialog in dialogs
    }
    listed = [of_dialogs.get(str(sample["dialog_id"]), none) for sample in samples]
    if not any(map(len, listed)):
        raise DataError(
            f"--negatives {source}: no image that it lists is in {reader.url}; expected the corpus "
            "that the data set was prepared from, with its negative candidates"
        )
    return Listed(
        source, [found[found != index][:NUM_NEGATIVES] for index, found in enumerate(listed)]
    )
