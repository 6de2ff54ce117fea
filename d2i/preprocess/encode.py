"""From opened pictures to samples: encode, lay out, and say what became of each instance."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from d2i.config import Recipe
from d2i.context import context_tokens
from d2i.dialog import ImageRef, Instance
from d2i.encoders import Encoders
from d2i.preprocess.fetch.reasons import is_passing
from d2i.preprocess.handover import (
    FetchedPicture,
    ImageFeatures,
    SourceFile,
    SourcePicture,
    keeps_source,
)
from d2i.preprocess.ledger import LedgerRow, Status
from d2i.preprocess.records import instance_values
from d2i.preprocess.source_bytes import SourceBytes
from d2i.shards import Sample, json_bytes, npy_bytes

_MAX_DETAIL = 500
"""Characters of a failure's detail that the ledger keeps (ours)."""


def encode_pictures(
    pictures: Mapping[ImageRef, SourcePicture], encoders: Encoders
) -> dict[ImageRef, ImageFeatures]:
    """Encode each distinct picture once; those with non-finite latents are left out.

    Args:
        pictures: In the order of the plan, so that the batches' members come from it.
        encoders: What they are encoded by, a batch at a time.
    """
    features = {}
    refs = list(pictures)
    for start in range(0, len(refs), encoders.compute_batch_size):
        batch = refs[start : start + encoders.compute_batch_size]
        moments, clip = encoders.encode_images(np.stack([pictures[ref].pixels for ref in batch]))
        for ref, m, c in zip(batch, moments, clip, strict=True):
            if np.isfinite(m).all() and np.isfinite(c).all():
                features[ref] = ImageFeatures(m, c)
    return features


def build_samples(
    instances: Iterable[Instance],
    pictures: Mapping[ImageRef, SourceFile],
    features: Mapping[ImageRef, ImageFeatures],
    encoders: Encoders,
    recipe: Recipe,
    sources: SourceBytes,
) -> Iterator[Sample]:
    """Yield the samples of one shard, in key order, of the instances that have features."""
    chosen = sorted((i for i in instances if i.image_ref in features), key=lambda i: i.key)
    for start in range(0, len(chosen), encoders.compute_batch_size):
        batch = chosen[start : start + encoders.compute_batch_size]
        tokens = np.stack([context_tokens(instance.context, recipe.text) for instance in batch])
        text = encoders.encode_text(tokens) if recipe.text.latents == "full" else None
        for row, instance in enumerate(batch):
            picture, image = pictures[instance.image_ref], features[instance.image_ref]
            members = {
                "json": _metadata(instance, picture),
                "moments.npy": npy_bytes(image.moments),
                "clip.npy": npy_bytes(image.clip),
                "tokens.npy": npy_bytes(tokens[row]),
            }
            if text is not None:
                members["text.npy"] = npy_bytes(text[row])
            source = sources.get(instance.image_ref) if keeps_source(instance, recipe) else None
            if source is not None:
                members[picture.suffix] = source
            yield Sample(instance.key, members)


def ledger_row(
    instance: Instance, found: FetchedPicture, features: Mapping[ImageRef, ImageFeatures]
) -> LedgerRow:
    """Say what became of one instance."""
    fetched, picture = found.fetched, found.picture
    reason, detail = fetched.reason, fetched.detail
    if reason == "ok" and found.ref not in features:
        reason, detail = "non_finite_latent", "an encoder gave a value beyond float16"
    return LedgerRow(
        key=instance.key,
        image=instance.image_ref.value[0] if instance.image_ref.value else "",
        status=_status(reason),
        reason=reason,
        detail=_shortened(detail),
        attempts=fetched.attempts,
        http_status=fetched.http_status,
        final_url=fetched.final_url,
        size_bytes=picture.size_bytes if picture else None,
        width=picture.width if picture else None,
        height=picture.height if picture else None,
        sha256=picture.sha256 if picture else None,
        time_s=found.time_s,
    )


def _shortened(detail: str) -> str:
    """Cut what a server may have written at any length."""
    return detail if len(detail) <= _MAX_DETAIL else f"{detail[:_MAX_DETAIL]}…"


def _status(reason: str) -> Status:
    if reason == "ok":
        return "ok"
    return "passing" if is_passing(reason) else "permanent"


def _metadata(instance: Instance, picture: SourceFile) -> bytes:
    source = {
        "ref": list(instance.image_ref.value),
        "sha256": picture.sha256,
        "size_bytes": picture.size_bytes,
        "width": picture.width,
        "height": picture.height,
    }
    return json_bytes(instance_values(instance) | {"source": source})
