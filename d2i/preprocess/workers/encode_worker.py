"""The encode worker: one planned shard at a time, from decoded images to a committed shard."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from d2i.cluster import JobFault, device_of_worker
from d2i.config import Recipe
from d2i.dialog import Instance
from d2i.encoders import Encoders, load_encoders
from d2i.encoders.data_fingerprint import image_part, make_fingerprint
from d2i.encoders.reconstruction import NUM_MEASURED, Reconstruction, measure
from d2i.errors import CheckpointError, ShardError
from d2i.io import storage
from d2i.io.config_lock import lock_or_diff
from d2i.preprocess.ledger import LedgerRow, count_failures, write_ledger
from d2i.preprocess.placeholders import refuse_placeholders
from d2i.preprocess.plan.planner import fingerprint_url
from d2i.preprocess.plan.supplements import net_failures
from d2i.preprocess.reuse import NOTHING_REUSED, Reuse, Reused, ReusedSplits
from d2i.preprocess.workers.encode import (
    build_samples,
    encode_contexts,
    encode_source_images,
    ledger_row,
    with_text,
)
from d2i.preprocess.workers.messages import (
    FetchedBlock,
    FetchedImage,
    ShardResult,
    ShardTask,
    receive,
)
from d2i.preprocess.workers.spill_buffer import SpillBuffer, source_bytes
from d2i.prompt_text import text_tokens
from d2i.shards import Sample, declares_arrays, npy_bytes, write_shard


@dataclass(frozen=True)
class EncodeWorkerBuilder:
    """Picklable builder of the encode worker, called where the worker runs."""

    recipe: Recipe
    split_urls: tuple[str, ...]
    fault: JobFault | None = None
    reuse: Reuse | None = None

    def __call__(self) -> EncodeWorker:
        """Load the encoders, and lock the fingerprint that all workers must share.

        Raises:
            ShardError: If existing shards were made with other weights, settings or versions.
            CheckpointError: If the text encoder has no finite features of the empty text.
        """
        precision = self.recipe.preprocess.encoder_precision
        encoders = load_encoders(self.recipe.encoders, device_of_worker(), precision)
        worker = EncodeWorker(self, encoders)
        for split_url in self.split_urls:
            worker.lock_fingerprint(split_url)
        return worker


class ImagePartWorker:
    """Loads the encoders of a job, for what they make of an image."""

    def run(self, builder: EncodeWorkerBuilder) -> dict[str, Any]:
        """Return what determines the arrays of an image, in the data that the job makes."""
        encode = builder()
        return image_part(encode.fingerprint, encode.declared)


@dataclass(frozen=True)
class Encoded:
    """Instances after encoding.

    Args:
        samples: Of the instances that have features, in key order; built lazily.
        rows: The ledger rows of all instances.
    """

    samples: Iterator[Sample]
    rows: list[LedgerRow]


class EncodeWorker:
    """Holds the encoders; `run` makes one shard."""

    def __init__(self, builder: EncodeWorkerBuilder, encoders: Encoders) -> None:
        self._recipe = builder.recipe
        self._fault = builder.fault
        self._encoders = encoders
        self._reused = ReusedSplits(builder.reuse)
        self.fingerprint = make_fingerprint(builder.recipe, encoders)
        self.declared = encoders.arrays(builder.recipe.image, builder.recipe.text)

    def lock_fingerprint(self, split_url: str) -> None:
        """Lock or check the fingerprint of the shards; in format 1 write the features of '' too."""
        if differences := lock_or_diff(fingerprint_url(split_url), self.fingerprint):
            raise ShardError(
                f"{split_url} holds shards made with other settings, weights or versions: "
                f"got {'; '.join(differences[:3])}; choose another --out, or use the earlier ones"
            )
        empty = self._empty_features()
        if declares_arrays(self.fingerprint):
            return
        for name, array in empty.items():
            url, data = storage.join(split_url, name), npy_bytes(array)
            if not storage.exists(url) or storage.read_bytes(url) != data:
                storage.write_bytes(url, data)

    def run(self, task: ShardTask, blocks: Iterable[FetchedBlock]) -> ShardResult:
        """Encode and publish one planned shard; its commit record comes last."""
        instances, images = receive(blocks)
        with source_bytes(task.split_url) as sources:
            found = refuse_placeholders(
                sources.taken_from(images),
                task.placeholders,
                self._recipe.fetch.num_same_pictures,
            )
            reused = self._reused.read(task, instances, self._recipe, sources)
            made = self.encode(instances, found, sources, reused)
            result = self._publish(task, made.samples, made.rows)
            if task.index:
                return result
            return replace(result, reconstruction=self._measure(found))

    def _measure(self, found: list[FetchedImage]) -> Reconstruction | None:
        """Measure what the autoencoder keeps of some images, so that a poor one is known early."""
        usable = sorted((one for one in found if one.image), key=lambda one: one.ref.value)
        pixels = [one.image.pixels for one in usable[:NUM_MEASURED] if one.image]
        return measure(self._encoders.vae, np.stack(pixels)) if pixels else None

    def encode(
        self,
        instances: Sequence[Instance],
        found: list[FetchedImage],
        sources: SpillBuffer,
        reused: Reused = NOTHING_REUSED,
    ) -> Encoded:
        """Encode the fetched images and the contexts; return samples and ledger rows.

        Args:
            instances: In the plan's order.
            found: The fetch results of their images.
            sources: Source bytes that the samples keep, stored until the samples are built.
            reused: Known results of images that were not fetched.
        """
        # Sorted by reference, so that batches do not depend on the order of arrival.
        images = {
            one.ref: one.image
            for one in sorted(found, key=lambda one: one.ref.value)
            if one.image is not None and one.fetched.reason == "ok"
        }
        features = encode_source_images(images, self._encoders)
        self.trigger_at("encode.images")
        outcomes = {one.ref: one for one in found}
        with_outcome = (instance for instance in instances if instance.image_ref in outcomes)
        rows = [ledger_row(i, outcomes[i.image_ref], features) for i in with_outcome]
        features |= reused.features
        # Encoded before the samples are read, as the ledger with the failures is written first.
        with_image = [instance for instance in instances if instance.image_ref in features]
        texts = encode_contexts(with_image, self._encoders, self._recipe)
        samples = build_samples(
            with_image,
            {**images, **reused.images},
            features,
            texts,
            self.declared,
            self._recipe,
            sources,
        )
        return Encoded(samples, [with_text(r, texts) for r in (*rows, *reused.rows(instances))])

    def _empty_features(self) -> dict[str, NDArray[np.generic]]:
        tokens = text_tokens("", self._recipe.text)
        features: dict[str, NDArray[np.generic]] = {"empty_tokens.npy": tokens}
        if self._recipe.text.latents == "full":
            text = self._encoders.encode_text(tokens[None])[0]
            if not np.isfinite(text).all():
                raise CheckpointError(
                    f"{self._recipe.encoders.clip_text}: its output for the empty text does not "
                    "fit in float16; expected finite latents; use other weights, or another "
                    "precision with --set preprocess.encoder_precision=PRECISION"
                )
            features["empty_text.npy"] = text
        return features

    def _publish(
        self, task: ShardTask, samples: Iterable[Sample], rows: list[LedgerRow]
    ) -> ShardResult:
        write_ledger(task.split_url, task.index, rows)
        self.trigger_at("ledger.written")
        commit = write_shard(
            samples,
            task.split_url,
            task.index,
            failures=net_failures(rows, task.failed_before),
            fingerprint=self.fingerprint,
            fault=self.trigger_at,
        )
        return ShardResult(commit.num_samples, count_failures(rows))

    def trigger_at(self, point: str) -> None:
        """Report a fault point to the job's fault injection, if there is one."""
        if self._fault:
            self._fault.trigger_at(point)
