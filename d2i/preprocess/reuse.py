"""Images of earlier prepared data: `--reuse DIR` fetches none of them again.

Their arrays are copied if the same encoders would make them again; else the source bytes that the
shards keep are decoded and encoded. An instance is found by its key, and only if it names the same
image. Earlier failures are copied with their reason and without a request, so that both data sets
hold the same instances; but images that failed as too small are fetched again, as the new limit
decides, and so are those too small for arrays to be copied. Must not import torch.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from d2i.config import Recipe
from d2i.dialog import ImageRef, Instance
from d2i.encoders.data_fingerprint import image_arrays, image_part
from d2i.errors import ShardError
from d2i.io import storage
from d2i.io.config_lock import diff
from d2i.preprocess.ledger import NON_FINITE_TEXT, SCHEMA, LedgerRow, ledger_tables
from d2i.preprocess.workers.messages import Features, ShardTask, SourceFile, keeps_source
from d2i.preprocess.workers.spill_buffer import SpillBuffer
from d2i.shards import IMAGE_SUFFIXES, ShardReader, check_json, npy_array


@dataclass(frozen=True)
class Reuse:
    """Earlier prepared data; picklable.

    Args:
        directory: Its directory, with the same splits.
        encodes_again: Whether its source bytes are encoded, rather than its arrays copied.
    """

    directory: str
    encodes_again: bool = False


def plan_reuse(directory: str, splits: Sequence[str], expected: Mapping[str, Any]) -> Reuse:
    """Return how images of earlier data are reused.

    Args:
        directory: Of the earlier data.
        splits: The splits to prepare.
        expected: What determines the arrays of an image in the new data (`image_part`).

    Raises:
        ShardError: If a split is missing, unfinished or damaged, or if its images were encoded
            differently, and their source bytes are not kept.
    """
    readers = [ShardReader(storage.join(directory, split)) for split in splits]
    manifests = [reader.manifest for reader in readers]
    differences = [diff(image_part(m.fingerprint, m.arrays), expected) for m in manifests]
    named = next((found for found in differences if found), None)
    if named is None:
        return Reuse(directory)
    for reader in readers:
        if len(reader) and reader.read_image(0) is None:
            raise ShardError(
                f"--reuse {reader.url}: its images were encoded differently: "
                f"{'; '.join(named[:3])}; expected source bytes to encode again, which "
                "preprocess.keep_images=always keeps; omit --reuse, or use the earlier weights, "
                "settings and versions"
            )
    return Reuse(directory, encodes_again=True)


@dataclass(frozen=True)
class Reused:
    """Known results of a shard's images, by image reference."""

    images: dict[ImageRef, SourceFile] = field(default_factory=dict)
    features: dict[ImageRef, Features] = field(default_factory=dict)
    failures: dict[ImageRef, LedgerRow] = field(default_factory=dict)

    def rows(self, instances: Sequence[Instance]) -> Iterator[LedgerRow]:
        """Yield the ledger rows of those instances whose image is known."""
        for instance in instances:
            if instance.image_ref in self.failures:
                yield replace(self.failures[instance.image_ref], key=instance.key)
            elif instance.image_ref in self.images:
                yield _row(instance, self.images[instance.image_ref])


NOTHING_REUSED = Reused()


class ReusedSplits:
    """The splits of earlier prepared data, each opened when it is needed."""

    def __init__(self, reuse: Reuse | None) -> None:
        self._reuse = reuse
        self._open: dict[str, ReusedSplit] = {}

    def known(
        self, task: ShardTask, instances: Sequence[Instance], recipe: Recipe
    ) -> set[ImageRef]:
        """Return the images of a shard that need not be fetched."""
        split = self._split(task.split_url)
        return split.known(task, instances, recipe) if split else set()

    def source_bytes(
        self, task: ShardTask, instances: Sequence[Instance], recipe: Recipe
    ) -> Iterator[tuple[ImageRef, bytes]]:
        """Yield the source bytes to encode again; none if arrays are copied."""
        split = self._split(task.split_url)
        return split.source_bytes(instances, recipe) if split else iter(())

    def read(
        self,
        task: ShardTask,
        instances: Sequence[Instance],
        recipe: Recipe,
        sources: SpillBuffer,
    ) -> Reused:
        """Read the known results of a shard's images; see `ReusedSplit.read`."""
        split = self._split(task.split_url)
        return split.read(task, instances, recipe, sources) if split else NOTHING_REUSED

    def _split(self, split_url: str) -> ReusedSplit | None:
        """Open the split that has the name of the new one.

        Raises:
            ShardError: If it is missing, unfinished or damaged.
        """
        if self._reuse is None:
            return None
        url = storage.join(self._reuse.directory, split_url.rpartition("/")[2])
        if url not in self._open:
            self._open[url] = ReusedSplit(url, encodes_again=self._reuse.encodes_again)
        return self._open[url]


class ReusedSplit:
    """The images of one prepared split, by the keys of its samples.

    Args:
        url: The split.
        encodes_again: Whether its source bytes are encoded, rather than its arrays copied.
    """

    def __init__(self, url: str, *, encodes_again: bool) -> None:
        self._reader, self._encodes_again = ShardReader(url), encodes_again
        self._positions_of_keys = KeyIndex(self._reader.keys)
        tables = [table.filter(_lacks_image(table)) for _, table in ledger_tables(url)]
        self._image_arrays = image_arrays(self._reader.manifest.arrays)
        self._failures = pa.concat_tables([SCHEMA.empty_table(), *tables]).combine_chunks()
        self._positions_of_failures = KeyIndex(self._failures["key"].to_pylist())

    def known(
        self, task: ShardTask, instances: Sequence[Instance], recipe: Recipe
    ) -> set[ImageRef]:
        """Return the images of a shard that need not be fetched."""
        return {*self._positions(instances, recipe), *self._failed(task, instances)}

    def read(
        self,
        task: ShardTask,
        instances: Sequence[Instance],
        recipe: Recipe,
        sources: SpillBuffer,
    ) -> Reused:
        """Read the known results of a shard's images, every byte checked against its checksum.

        Those to encode again are no results yet: see `source_bytes`.

        Args:
            task: The shard.
            instances: Its instances.
            recipe: Of the new data.
            sources: Receives their source bytes, where there are any.

        Raises:
            ShardError: If a byte has changed; `d2i repair` restores it.
        """
        positions = {} if self._encodes_again else self._positions(instances, recipe)
        reused = Reused(failures=self._failed(task, instances))
        for ref, position in positions.items():
            members = self._reader.read_members(position)
            suffix = next((suffix for suffix in IMAGE_SUFFIXES if suffix in members), "")
            if suffix:
                sources.put(ref, members[suffix])
            reused.images[ref] = _source_file(members["json"], suffix)
            reused.features[ref] = {
                name: npy_array(members[f"{name}.npy"]) for name in self._image_arrays
            }
        return reused

    def source_bytes(
        self, instances: Sequence[Instance], recipe: Recipe
    ) -> Iterator[tuple[ImageRef, bytes]]:
        """Yield the source bytes of a shard's images to encode again, checked against checksums.

        Raises:
            ShardError: If a byte has changed; `d2i repair` restores it.
        """
        if not self._encodes_again:
            return
        for ref, position in self._positions(instances, recipe).items():
            data = self._reader.read_image(position)
            if data is not None:
                yield ref, data

    def _positions(self, instances: Sequence[Instance], recipe: Recipe) -> dict[ImageRef, int]:
        found: dict[ImageRef, int] = {}
        for instance in instances:
            position = self._positions_of_keys.find(instance.key)
            if position is not None and instance.image_ref not in found:
                sample = self._reader.read_json(position)
                wants_bytes = self._encodes_again or keeps_source(instance, recipe)
                if self._is_usable(sample["source"], instance, recipe) and (
                    not wants_bytes or self._reader.read_image(position) is not None
                ):
                    found[instance.image_ref] = position
        return found

    def _is_usable(self, source: Mapping[str, Any], instance: Instance, recipe: Recipe) -> bool:
        """Return whether a sample's image is the instance's, and its arrays serve the new data."""
        is_same = source["ref"] == list(instance.image_ref.value)
        is_small = recipe.image.upscale_problem(source["width"], source["height"])
        return is_same and (self._encodes_again or not is_small)

    def _failed(self, task: ShardTask, instances: Sequence[Instance]) -> dict[ImageRef, LedgerRow]:
        """Return the earlier failures; none for a supplement, whose purpose is to retry them."""
        if task.failed_before:
            return {}
        positions = [self._positions_of_failures.find(instance.key) for instance in instances]
        return {
            instance.image_ref: LedgerRow(**self._failures.slice(position, 1).to_pylist()[0])
            for instance, position in zip(instances, positions, strict=True)
            if position is not None
        }


def _lacks_image(table: pa.Table) -> pa.ChunkedArray:
    """Return a mask of failures that new data share.

    The text is encoded again, and the limits on an image's size may be others.
    """
    failed = pc.not_equal(table["status"], "ok")
    again = pc.is_in(table["reason"], value_set=pa.array([NON_FINITE_TEXT, "too_small"]))
    return pc.and_(failed, pc.invert(again))


def _source_file(json: bytes, suffix: str) -> SourceFile:
    source = check_json(json)["source"]
    return SourceFile(
        suffix=suffix,
        width=source["width"],
        height=source["height"],
        size_bytes=source["size_bytes"],
        sha256=source["sha256"],
    )


def _row(instance: Instance, source_file: SourceFile) -> LedgerRow:
    return LedgerRow(
        key=instance.key,
        image=instance.image_ref.value[0],
        status="ok",
        reason="ok",
        detail="image features reused from earlier data",
        attempts=0,
        http_status=None,
        final_url=None,
        size_bytes=source_file.size_bytes,
        width=source_file.width,
        height=source_file.height,
        sha256=source_file.sha256,
        time_s=time.time(),
    )


class KeyIndex:
    """Positions of keys in a sequence; takes 16 bytes per key, beside the sequence itself.

    Args:
        keys: Distinct keys; all are read at the start, and single ones later.
    """

    def __init__(self, keys: Sequence[str]) -> None:
        self._keys = keys
        hashes = np.fromiter(map(hash, keys), np.int64, len(keys))
        self._order = np.argsort(hashes)
        self._hashes = hashes[self._order]

    def find(self, key: str) -> int | None:
        """Return the position of a key, or None if it is absent."""
        wanted = hash(key)
        first = np.searchsorted(self._hashes, wanted)
        stop = np.searchsorted(self._hashes, wanted, side="right")
        places = self._order[first:stop].tolist()
        return next((place for place in places if self._keys[place] == key), None)
