"""Train-test leakage: images that occur, or seem to, in more than one split.

Test is protected from valid and train, valid from train. The instance listed is the one to leave
out, so that the test set stays the one that others evaluate on.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Literal

from msgspec import Struct

from d2i.config import ImageConfig
from d2i.corpora import Corpus, corpus_instances
from d2i.corpora.splits import source_directory
from d2i.corpus_analysis.perceptual_hash import HashIndex, PerceptualHash, perceptual_hash_of
from d2i.dialog import SPLITS, Instance
from d2i.images.decode import ImageRejectedError, decode_image
from d2i.images.image_files import check_root, read_image
from d2i.io import storage

_MAX_IMAGE_BYTES = 20 << 20
_CHUNK = 256


class Leak(Struct, frozen=True):
    """An instance whose image occurs in another split as well.

    `distance` is 0 for the same image by name, else the number of bits in which the hashes differ.
    """

    key: str
    split: str
    reason: Literal["shared_image", "near_duplicate"]
    other_key: str
    other_split: str
    distance: int = 0


class ImageCount(Struct):
    """Number of distinct images of a split that were read, and of the others by reason."""

    num_read: int
    failures: dict[str, int]


class LeakFinder:
    """Finds split leakage: images, and near-duplicates of them, that occur in more than one split.

    Reads the splits of a corpus, test first, and yields the instances that leak.

    Args:
        corpus: The corpus, with its options.
        source: Path or fsspec URL of the corpus.
        near_duplicates: True to also find near-duplicates, by perceptual hashes of the image files.
        on_image: Called with the split for every image file that was tried.

    Raises:
        ConfigError, DataError: If files are to be read and `image_root` cannot hold them.
    """

    def __init__(
        self, corpus: Corpus, source: str, *, near_duplicates: bool, on_image: Callable[[str], None]
    ) -> None:
        self.images: dict[str, ImageCount] = {}
        self._corpus = corpus
        self._source = source
        self._with_near_duplicates = near_duplicates
        self._on_image = on_image
        self._image_root = storage.resolve(corpus.image_root or source_directory(source))
        if near_duplicates and corpus.image_root:
            check_root(self._image_root)
        self._protected: dict[str, tuple[str, str]] = {}
        self._hashes = HashIndex()

    @property
    def has_hashed(self) -> bool:
        """True if any image file could be read."""
        return any(count.num_read for count in self.images.values())

    def find(self, splits: list[str]) -> Iterator[Leak]:
        """Yield the leaks of these splits, each split's in the order of its files."""
        for split in reversed([name for name in SPLITS if name in splits]):
            near = self._near_duplicates(split) if self._with_near_duplicates else {}
            own: dict[str, tuple[str, str]] = {}
            for instance in self._instances(split):
                image_id = self._corpus.image_id(instance.image_ref)
                leak = self._leak(instance, image_id, near)
                if leak is not None:
                    yield leak
                if split != "train" and image_id not in self._protected:
                    own.setdefault(image_id, (instance.key, split))
            self._protected |= own

    def _leak(
        self, instance: Instance, image_id: str, near: dict[str, tuple[str, int]]
    ) -> Leak | None:
        if image_id in self._protected:
            key, split = self._protected[image_id]
            return Leak(instance.key, instance.split, "shared_image", key, split)
        if image_id in near:
            other_id, distance = near[image_id]
            key, split = self._protected[other_id]
            return Leak(instance.key, instance.split, "near_duplicate", key, split, distance)
        return None

    def _near_duplicates(self, split: str) -> dict[str, tuple[str, int]]:
        """Map images of a split to the protected image each looks like, and the hash distance."""
        near, hashes, failures, num_read = {}, [], Counter[str](), 0
        for image_id, image_hash in self._read_hashes(split):
            self._on_image(split)
            if isinstance(image_hash, str):
                failures[image_hash] += 1
                continue
            num_read += 1
            if image_hash is None or image_id in self._protected:
                continue
            found = self._hashes.nearest(image_hash)
            if found is not None:
                near[image_id] = found
            if split != "train":
                hashes.append((image_id, image_hash))
        for image_id, image_hash in hashes:
            self._hashes.add(image_id, image_hash)
        self.images[split] = ImageCount(num_read, dict(sorted(failures.items())))
        return near

    def _read_hashes(self, split: str) -> Iterator[tuple[str, PerceptualHash | str | None]]:
        """Yield each distinct image file of a split with its hash, or the reason it has none."""
        images = self._distinct_files(split)
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            while chunk := list(islice(images, _CHUNK)):
                hashes = threads.map(self._read_hash, [path for _, path in chunk])
                yield from zip([image_id for image_id, _ in chunk], hashes, strict=True)

    def _distinct_files(self, split: str) -> Iterator[tuple[str, str]]:
        seen: set[str] = set()
        for instance in self._instances(split):
            image_id = self._corpus.image_id(instance.image_ref)
            if instance.image_ref.kind == "file" and image_id not in seen:
                seen.add(image_id)
                yield image_id, instance.image_ref.value[0]

    def _read_hash(self, path: str) -> PerceptualHash | str | None:
        try:
            data = read_image(self._image_root, path, _MAX_IMAGE_BYTES)
            return perceptual_hash_of(decode_image(data, ImageConfig()).image)
        except ImageRejectedError as err:
            return err.reason

    def _instances(self, split: str) -> Iterator[Instance]:
        """Read a split without reporting record issues, which were reported before."""
        return corpus_instances(
            self._corpus, self._source, split, on_problem=lambda _: None, max_broken=1.0
        )


def count_leaks(leaks: Iterator[Leak]) -> list[dict[str, str | int]]:
    """Count leaks by splits and reason: instances, and the protected images they show."""
    instances: Counter[tuple[str, str, str]] = Counter()
    images: dict[tuple[str, str, str], set[str]] = {}
    for leak in leaks:
        group = (leak.split, leak.other_split, leak.reason)
        instances[group] += 1
        images.setdefault(group, set()).add(leak.other_key)
    return [
        {
            "split": split,
            "other_split": other_split,
            "reason": reason,
            "num_instances": num_instances,
            "num_images": len(images[split, other_split, reason]),
        }
        for (split, other_split, reason), num_instances in sorted(instances.items())
    ]
