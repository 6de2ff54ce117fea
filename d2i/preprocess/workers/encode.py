"""Encoding of images and contexts into samples, with a ledger row for each instance."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from d2i.config import Recipe
from d2i.dialog import ImageRef, Instance
from d2i.encoders import Encoders
from d2i.errors import ShardError
from d2i.fetch.result import is_transient
from d2i.preprocess.ledger import NON_FINITE_TEXT, LedgerRow, Status
from d2i.preprocess.plan.record_files import instance_values
from d2i.preprocess.workers.messages import (
    Features,
    FetchedImage,
    SourceFile,
    SourceImage,
    keeps_source,
)
from d2i.preprocess.workers.spill_buffer import SpillBuffer
from d2i.prompt_text import context_tokens
from d2i.shards import DeclaredArray, Sample, json_bytes, npy_bytes

_MAX_DETAIL = 500
"""Characters of a failure's detail that the ledger keeps, as a server may send any number."""


def encode_source_images(
    images: Mapping[ImageRef, SourceImage], encoders: Encoders
) -> dict[ImageRef, Features]:
    """Encode each distinct image once; leave out those with non-finite latents.

    Args:
        images: In a fixed order, as it decides which images share a batch.
        encoders: The encoders, which take one batch at a time.
    """
    features: dict[ImageRef, Features] = {}
    refs = list(images)
    for start in range(0, len(refs), encoders.compute_batch_size):
        batch = refs[start : start + encoders.compute_batch_size]
        encoded = encoders.encode_images(np.stack([images[ref].pixels for ref in batch]))
        for row, ref in enumerate(batch):
            arrays = {name: rows[row] for name, rows in encoded.items()}
            if _is_finite(arrays):
                features[ref] = arrays
    return features


def _is_finite(arrays: Features) -> bool:
    return all(np.isfinite(array).all() for array in arrays.values())


def encode_contexts(
    instances: Iterable[Instance], encoders: Encoders, recipe: Recipe
) -> dict[str, Features]:
    """Encode the context of each instance, by key; leave out those with non-finite latents.

    Args:
        instances: Of one shard, in any order; all their latents are held in memory at once.
        encoders: The encoders, which take one batch at a time.
        recipe: Sets how contexts are tokenized, and whether latents are stored.
    """
    features: dict[str, Features] = {}
    ordered = sorted(instances, key=lambda i: i.key)
    for start in range(0, len(ordered), encoders.compute_batch_size):
        batch = ordered[start : start + encoders.compute_batch_size]
        encoded: dict[str, NDArray[np.generic]] = {}
        if encoders.clip_text:
            tokens = np.stack([context_tokens(i.context, recipe.text) for i in batch])
            encoded["tokens"] = tokens
            if recipe.text.latents == "full":
                encoded["text"] = encoders.encode_text(tokens)
        for row, instance in enumerate(batch):
            arrays = {name: rows[row] for name, rows in encoded.items()}
            if _is_finite(arrays):
                features[instance.key] = arrays
    return features


def build_samples(
    instances: Iterable[Instance],
    images: Mapping[ImageRef, SourceFile],
    features: Mapping[ImageRef, Features],
    texts: Mapping[str, Features],
    declared: Mapping[str, DeclaredArray],
    recipe: Recipe,
    sources: SpillBuffer,
) -> Iterator[Sample]:
    """Yield the samples of one shard, in key order, for instances with image and text features.

    Raises:
        ShardError: If an array is not as declared, such as one that is reused.
    """
    chosen = (i for i in instances if i.image_ref in features and i.key in texts)
    for instance in sorted(chosen, key=lambda i: i.key):
        source_file = images[instance.image_ref]
        arrays = {**features[instance.image_ref], **texts[instance.key]}
        members = {"json": _metadata(instance, source_file)}
        for name, expected in declared.items():
            found = arrays[name]
            if (found.dtype.name, found.shape) != (expected.dtype, expected.shape):
                raise ShardError(
                    f"{instance.key}: {name} is {found.dtype} {found.shape}, expected "
                    f"{expected.dtype} {expected.shape} of the recipe's encoders; prepare with "
                    "the encoders and the resolution that made it"
                )
            members[f"{name}.npy"] = npy_bytes(found)
        source = sources.get(instance.image_ref) if keeps_source(instance, recipe) else None
        if source is not None:
            members[source_file.suffix] = source
        yield Sample(instance.key, members)


def ledger_row(
    instance: Instance, found: FetchedImage, features: Mapping[ImageRef, Features]
) -> LedgerRow:
    """Return the ledger row of one instance, judged by its image alone."""
    fetched, source_file = found.fetched, found.image
    reason, detail = fetched.reason, fetched.detail
    if reason == "ok" and found.ref not in features:
        reason, detail = "non_finite_latent", "an encoder output does not fit in float16"
    return LedgerRow(
        key=instance.key,
        image=instance.image_ref.value[0] if instance.image_ref.value else "",
        status=_status(reason),
        reason=reason,
        detail=_shortened(detail),
        attempts=fetched.attempts,
        http_status=fetched.http_status,
        final_url=fetched.final_url,
        size_bytes=source_file.size_bytes if source_file else None,
        width=source_file.width if source_file else None,
        height=source_file.height if source_file else None,
        sha256=source_file.sha256 if source_file else None,
        time_s=found.time_s,
    )


def with_text(row: LedgerRow, texts: Mapping[str, Features]) -> LedgerRow:
    """Return the ledger row of an instance once its context is encoded too."""
    if row.status != "ok" or row.key in texts:
        return row
    detail = "the text encoder output does not fit in float16"
    return replace(row, status=_status(NON_FINITE_TEXT), reason=NON_FINITE_TEXT, detail=detail)


def _shortened(detail: str) -> str:
    """Truncate a detail, as a server may send text of any length."""
    return detail if len(detail) <= _MAX_DETAIL else f"{detail[:_MAX_DETAIL]}…"


def _status(reason: str) -> Status:
    if reason == "ok":
        return "ok"
    return "passing" if is_transient(reason) else "permanent"


def _metadata(instance: Instance, source_file: SourceFile) -> bytes:
    source = {
        "ref": list(instance.image_ref.value),
        "sha256": source_file.sha256,
        "size_bytes": source_file.size_bytes,
        "width": source_file.width,
        "height": source_file.height,
    }
    return json_bytes(instance_values(instance) | {"source": source})
