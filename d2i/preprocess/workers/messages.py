"""Messages between the stages: a planned shard, its decoded images, and the written result."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from d2i.config import Recipe
from d2i.dialog import ImageRef, Instance
from d2i.fetch.result import FetchResult
from d2i.preprocess.plan.planner import records_url
from d2i.preprocess.plan.record_files import read_records

if TYPE_CHECKING:
    from d2i.encoders.reconstruction import Reconstruction


@dataclass(frozen=True)
class ShardTask:
    """One planned shard of one split.

    Args:
        split_url: The data set.
        index: Number of the shard.
        failed_before: For a supplement: earlier failures of its instances, counted by reason.
        placeholders: For a supplement: sha256 of images that were found to be placeholders.
        keys: For a repair: the instances to make; None makes all that were planned.
        records_sha256: Sha256 of the file of its records, if the plan has it.
    """

    split_url: str
    index: int
    failed_before: dict[str, int] = field(default_factory=dict)
    placeholders: frozenset[str] = frozenset()
    keys: frozenset[str] | None = None
    records_sha256: str | None = None

    def read_instances(self) -> list[Instance]:
        """Read the instances to make, in the plan's order.

        The fetch worker does, and sends them on with the images (`FetchedBlock`).
        """
        planned = read_records(records_url(self.split_url, self.index), self.records_sha256)
        return [i for i in planned if self.keys is None or i.key in self.keys]


@dataclass(frozen=True, kw_only=True)
class SourceFile:
    """The file of a usable image.

    Args:
        suffix: `jpg`, `png`, `webp` or `gif`.
        width: Of the whole upright image, in pixels.
        height: Of the whole upright image, in pixels.
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
    """An image to encode: its file, and its square crop, uint8 (R, R, 3)."""

    pixels: NDArray[np.uint8]


Features = Mapping[str, NDArray[np.generic]]
"""Arrays of one image or one context, by name: what the encoders declare (`Encoders.arrays`)."""


def keeps_source(instance: Instance, recipe: Recipe) -> bool:
    """Return whether the shard keeps the source bytes of an instance's image."""
    return instance.split != "train" or recipe.preprocess.keep_images == "always"


@dataclass(frozen=True)
class FetchedImage:
    """The result of one distinct image.

    Args:
        ref: The image's reference.
        fetched: The fetch result, with the source bytes if the shard keeps them.
        image: The decoded image, if usable.
        time_s: Unix time at which it was decoded.
    """

    ref: ImageRef
    fetched: FetchResult
    image: SourceImage | None
    time_s: float


@dataclass(frozen=True)
class FetchedBlock:
    """A part of a shard, from the fetch worker.

    Args:
        images: Results of distinct images, in order of arrival.
        instances: In the first block, all instances of the shard in the plan's order; else none.
    """

    images: Sequence[FetchedImage]
    instances: Sequence[Instance] = ()


def receive(
    blocks: Iterable[FetchedBlock],
) -> tuple[Sequence[Instance], Iterator[FetchedImage]]:
    """Return the instances of a shard, and its images as their blocks arrive."""
    arriving = iter(blocks)
    instances = next(arriving).instances
    return instances, (found for block in arriving for found in block.images)


@dataclass(frozen=True)
class ShardResult:
    """Number of written instances of a planned shard, and the failures of the others by reason.

    Of the first shard of a split also the reconstruction of its first images, if it has any.
    """

    num_written: int
    failures: dict[str, int]
    reconstruction: Reconstruction | None = None
