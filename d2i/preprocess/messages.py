"""What the stages hand on: a planned shard, its opened pictures, and what was written of it."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from d2i.config import Recipe
from d2i.dialog import ImageRef, Instance
from d2i.preprocess.fetch.result import FetchResult
from d2i.preprocess.plan import records_url
from d2i.preprocess.records import read_records


@dataclass(frozen=True)
class ShardTask:
    """One planned shard of one split.

    Args:
        split_url: The data set.
        index: Number of the shard.
        failed_before: Of a supplement: why its instances failed before, counted by reason.
        placeholders: Of a supplement: sha256 of pictures that were found to stand for many.
        keys: Of a repair: the instances that are made; None: all that were planned.
        records_sha256: Of the file of its records, where the plan says it.
    """

    split_url: str
    index: int
    failed_before: dict[str, int] = field(default_factory=dict)
    placeholders: frozenset[str] = frozenset()
    keys: frozenset[str] | None = None
    records_sha256: str | None = None

    def instances(self) -> list[Instance]:
        """Read the instances that are to be made, in the plan's order."""
        planned = read_records(records_url(self.split_url, self.index), self.records_sha256)
        return [i for i in planned if self.keys is None or i.key in self.keys]


@dataclass(frozen=True, kw_only=True)
class SourceFile:
    """The file of a picture that can be used.

    Args:
        suffix: `jpg`, `png`, `webp` or `gif`.
        width: Of the whole, in pixels, upright.
        height: Of the whole, in pixels, upright.
        size_bytes: Length of the source bytes.
        sha256: Of the source bytes.
    """

    suffix: str
    width: int
    height: int
    size_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class SourceImage(SourceFile):
    """A picture that is to be encoded: its file, and its square crop, uint8 (R, R, 3)."""

    pixels: NDArray[np.uint8]


@dataclass(frozen=True)
class ImageFeatures:
    """What the image encoders made of one picture: moments f16 (8, h, w), clip f16 (clip_dim,)."""

    moments: NDArray[np.float16]
    clip: NDArray[np.float16]


def keeps_source(instance: Instance, recipe: Recipe) -> bool:
    """Say whether the shard keeps the source bytes of an instance's picture."""
    return instance.split != "train" or recipe.preprocess.keep_images == "always"


@dataclass(frozen=True)
class FetchedImage:
    """What came of one distinct picture.

    Args:
        ref: Which picture.
        fetched: How asking for it ended; with the source bytes where the shard keeps them.
        image: The picture, where it can be used.
        time_s: Unix time at which it was opened.
    """

    ref: ImageRef
    fetched: FetchResult
    image: SourceImage | None
    time_s: float


@dataclass(frozen=True)
class ShardResult:
    """How many instances of a planned shard were written, and why the others were not."""

    num_written: int
    failures: dict[str, int]
