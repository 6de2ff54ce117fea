"""The preprocessing worker: one planned shard at a time, from records to a committed shard."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from d2i import storage
from d2i.cluster import device_of_worker
from d2i.config import Recipe
from d2i.context import text_tokens
from d2i.encoders import Encoders, load_encoders
from d2i.encoders.bundle import versions
from d2i.errors import ClusterError, ShardError
from d2i.fault import Fault
from d2i.preprocess.decoder import Decoder
from d2i.preprocess.encode import (
    SourcePicture,
    build_samples,
    encode_pictures,
    ledger_row,
    open_picture,
)
from d2i.preprocess.fetch.sources import PictureSource
from d2i.preprocess.ledger import LedgerRow, count_failures, write_ledger
from d2i.preprocess.plan import records_url
from d2i.preprocess.records import read_records
from d2i.preprocess.retry import net_failures
from d2i.settle import settle
from d2i.shards import Sample, npy_bytes, write_shard
from d2i.tokenize import VOCABULARY_SHA256


@dataclass(frozen=True)
class ShardTask:
    """One planned shard of one split.

    Args:
        split_url: The data set.
        index: Number of the shard.
        failed_before: Of a supplement: why its instances failed before, counted by reason.
    """

    split_url: str
    index: int
    failed_before: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class ShardResult:
    """How many instances of a planned shard were written, and why the others were not."""

    num_written: int
    failures: dict[str, int]


@dataclass(frozen=True)
class ShardWorkerBuilder:
    """Builds the worker where it runs; picklable."""

    pictures: PictureSource
    recipe: Recipe
    split_urls: tuple[str, ...]
    fault: Fault | None = None

    def __call__(self) -> ShardWorker:
        """Load the encoders, and settle the fingerprint with every other worker.

        Raises:
            ShardError: If the shards there were made by other weights, settings or versions.
        """
        worker = ShardWorker(self, load_encoders(self.recipe.encoders, device_of_worker()))
        for split_url in self.split_urls:
            worker.settle(split_url)
        return worker


class ShardWorker:
    """Holds the encoders; `run` makes one shard."""

    def __init__(self, builder: ShardWorkerBuilder, encoders: Encoders) -> None:
        self._recipe = builder.recipe
        self._fault = builder.fault
        self._encoders = encoders
        self._fingerprint = fingerprint(builder.recipe, encoders)
        self._source = builder.pictures
        fetch = builder.recipe.fetch
        self._decoder = Decoder(builder.recipe.image, fetch.decode_timeout_s, fetch.max_decode_mib)

    def settle(self, split_url: str) -> None:
        """Write the fingerprint and the features of '' beside the shards, or check them."""
        if differences := settle(fingerprint_url(split_url), self._fingerprint):
            raise ShardError(
                f"{split_url} holds shards made otherwise: got {'; '.join(differences[:3])}; "
                "choose another --out, or the versions and weights of before"
            )
        for name, array in self._empty_features().items():
            url = storage.join(split_url, name)
            if not storage.exists(url):
                storage.write_bytes(url, npy_bytes(array))

    def run(self, task: ShardTask) -> ShardResult:
        """Fetch, encode and publish one planned shard; its commit record comes last."""
        instances = read_records(records_url(task.split_url, task.index))
        found = self._source.fetch(
            (instance.image_ref for instance in instances),
            lambda fetched: open_picture(fetched, self._decoder),
        )
        # A supplement holds only what failed before: that all of it fails again says nothing new.
        if not task.failed_before:
            self._refuse_trouble()
        pictures = {ref: p for ref, (_, p) in found.items() if isinstance(p, SourcePicture)}
        features = encode_pictures(pictures, self._encoders)
        samples = build_samples(instances, pictures, features, self._encoders, self._recipe)
        rows = [ledger_row(i, *found[i.image_ref], features) for i in instances]
        return self._publish(task, samples, rows)

    def _empty_features(self) -> dict[str, NDArray[np.generic]]:
        tokens = text_tokens("", self._recipe.text)
        features: dict[str, NDArray[np.generic]] = {"empty_tokens.npy": tokens}
        if self._recipe.text.latents == "full":
            features["empty_text.npy"] = self._encoders.encode_text(tokens[None])[0]
        return features

    def _refuse_trouble(self) -> None:
        """Stop where this machine reaches nothing, before a row says that all is dead.

        Raises:
            ClusterError: If it seems to be so.
        """
        if trouble := self._source.trouble():
            raise ClusterError(
                f"{trouble}: that looks like this machine's network, not like dead addresses; "
                "expected some to answer; mend it (DNS, firewall), then repeat the command: "
                "the rows of this shard were not written"
            )

    def _publish(
        self, task: ShardTask, samples: Sequence[Sample], rows: list[LedgerRow]
    ) -> ShardResult:
        write_ledger(task.split_url, task.index, rows)
        write_shard(
            samples,
            task.split_url,
            task.index,
            failures=net_failures(rows, task.failed_before),
            fingerprint=self._fingerprint,
            fault=self._fault.reach if self._fault else None,
        )
        return ShardResult(len(samples), count_failures(rows))


def fingerprint_url(split_url: str) -> str:
    """Return where the fingerprint lies while the manifest is not yet written."""
    return storage.join(split_url, "plan", "fingerprint.json")


def fingerprint(recipe: Recipe, encoders: Encoders) -> dict[str, dict[str, object]]:
    """Return all that decides a byte of a shard: an image part and a text part."""
    hashes = encoders.hashes()
    return {
        "image": {
            "vae": hashes["vae"],
            "vae_kind": recipe.encoders.vae_kind,
            "clip_image": hashes["clip_image"],
            "resolution": recipe.image.resolution,
            "resize": "lanczos, centre crop",
            "compute_batch_size": recipe.encoders.compute_batch_size,
            "device": encoders.vae.device,
            "versions": versions(),
        },
        "text": {
            "tokenizer": VOCABULARY_SHA256,
            "clip_text": hashes["clip_text"],
            **recipe.text.model_dump(),
        },
    }
