"""From fetched pictures to samples: decode, crop, encode, and say what became of each instance."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from d2i.config import Recipe
from d2i.context import context_tokens
from d2i.dialog import ImageRef, Instance
from d2i.encoders import Encoders
from d2i.pictures import RefusedPictureError
from d2i.preprocess.decoder import Decoder
from d2i.preprocess.fetch.fetched import Fetched
from d2i.preprocess.fetch.reasons import is_passing
from d2i.preprocess.ledger import LedgerRow, Status
from d2i.preprocess.records import instance_values
from d2i.shards import Sample, json_bytes, npy_bytes


@dataclass(frozen=True)
class SourcePicture:
    """One distinct picture of a shard: its bytes, its square crop, where it came from."""

    data: bytes
    suffix: str
    width: int
    height: int
    pixels: NDArray[np.uint8]

    @property
    def sha256(self) -> str:
        """The hash of the source bytes."""
        return hashlib.sha256(self.data).hexdigest()


@dataclass(frozen=True)
class ImageFeatures:
    """What the image encoders made of one picture: moments f16 (8, h, w), clip f16 (clip_dim,)."""

    moments: NDArray[np.float16]
    clip: NDArray[np.float16]


def open_picture(fetched: Fetched, decoder: Decoder) -> SourcePicture | Fetched:
    """Decode and crop fetched bytes, or return the failure with its reason."""
    if fetched.data is None:
        return fetched
    try:
        found = decoder.decode(fetched.data)
    except RefusedPictureError as err:
        return fetched.refused(err.reason, str(err))
    return SourcePicture(fetched.data, found.suffix, found.width, found.height, found.pixels)


def encode_pictures(
    pictures: Mapping[ImageRef, SourcePicture], encoders: Encoders
) -> dict[ImageRef, ImageFeatures]:
    """Encode each distinct picture once; those with non-finite latents are left out."""
    if not pictures:
        return {}
    moments, clip = encoders.encode_images(np.stack([p.pixels for p in pictures.values()]))
    return {
        ref: ImageFeatures(m, c)
        for ref, m, c in zip(pictures, moments, clip, strict=True)
        if np.isfinite(m).all() and np.isfinite(c).all()
    }


def build_samples(
    instances: list[Instance],
    pictures: Mapping[ImageRef, SourcePicture],
    features: Mapping[ImageRef, ImageFeatures],
    encoders: Encoders,
    recipe: Recipe,
) -> list[Sample]:
    """Build the samples of one shard, in key order, from the instances that have features."""
    chosen = sorted((i for i in instances if i.image_ref in features), key=lambda i: i.key)
    if not chosen:
        return []
    tokens = np.stack([context_tokens(instance.context, recipe.text) for instance in chosen])
    text = encoders.encode_text(tokens) if recipe.text.latents == "full" else None
    samples = []
    for row, instance in enumerate(chosen):
        picture, image = pictures[instance.image_ref], features[instance.image_ref]
        members = {
            "json": _metadata(instance, picture),
            "moments.npy": npy_bytes(image.moments),
            "clip.npy": npy_bytes(image.clip),
            "tokens.npy": npy_bytes(tokens[row]),
        }
        if text is not None:
            members["text.npy"] = npy_bytes(text[row])
        if instance.split != "train" or recipe.preprocess.keep_images == "always":
            members[picture.suffix] = picture.data
        samples.append(Sample(instance.key, members))
    return samples


def ledger_row(
    instance: Instance,
    fetched: Fetched,
    opened: SourcePicture | Fetched,
    features: Mapping[ImageRef, ImageFeatures],
) -> LedgerRow:
    """Say what became of one instance."""
    reason, detail = "ok", ""
    if isinstance(opened, Fetched):
        reason, detail = opened.reason, opened.detail
    elif instance.image_ref not in features:
        reason, detail = "non_finite_latent", "an encoder gave a value beyond float16"
    picture = opened if isinstance(opened, SourcePicture) else None
    return LedgerRow(
        key=instance.key,
        image=instance.image_ref.value[0] if instance.image_ref.value else "",
        status=_status(reason),
        reason=reason,
        detail=detail,
        attempts=fetched.attempts,
        http_status=fetched.http_status,
        final_url=fetched.final_url,
        size_bytes=len(picture.data) if picture else None,
        width=picture.width if picture else None,
        height=picture.height if picture else None,
        sha256=picture.sha256 if picture else None,
        time_s=time.time(),
    )


def _status(reason: str) -> Status:
    if reason == "ok":
        return "ok"
    return "passing" if is_passing(reason) else "permanent"


def _metadata(instance: Instance, picture: SourcePicture) -> bytes:
    source = {
        "ref": list(instance.image_ref.value),
        "sha256": picture.sha256,
        "size_bytes": len(picture.data),
        "width": picture.width,
        "height": picture.height,
    }
    return json_bytes(instance_values(instance) | {"source": source})
