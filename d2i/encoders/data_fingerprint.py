"""The fingerprint of a data set: everything that determines its bytes, and what made them.

In format 1 it has an image part and a text part, which also name the weights of the encoders. In
format 2 it declares the arrays as well, and the encoders are apart, by the names that the arrays
use.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from d2i.config import Recipe
from d2i.encoders.bundle import EncoderName, Encoders, versions
from d2i.errors import CheckpointError, ShardError
from d2i.images.decode import RESIZE
from d2i.shards import ArrayInfo, DeclaredArray, Manifest, check_format_1, declares_arrays
from d2i.tokenize import VOCABULARY_SHA256

_PARTS = {"vae": "image", "clip_image": "image", "clip_text": "text"}
"""The part of a dialog that each encoder reads: in format 1 it holds the hash of the weights."""

ENCODER_OF_ARRAY = {
    "moments": "vae",
    "latent": "vae",
    "clip": "clip_image",
    "tokens": "tokenizer",
    "text": "clip_text",
}
"""The encoder that makes each array that networks are trained on, as fingerprints name it."""


def make_fingerprint(recipe: Recipe, encoders: Encoders) -> dict[str, Any]:
    """Return the fingerprint of what a recipe and its encoders prepare.

    It is of format 2 if the recipe says so, or if format 1 cannot hold the arrays.
    """
    hashes, kind = encoders.hashes(), encoders.vae.kind
    image, text = _image_settings(recipe, encoders), _text_settings(recipe)
    arrays = encoders.arrays(recipe.image, recipe.text)
    if recipe.preprocess.format is None and _fits_format_1(arrays):
        image |= {"vae": hashes["vae"], "vae_kind": kind, "clip_image": hashes["clip_image"]}
        text |= {"tokenizer": VOCABULARY_SHA256, "clip_text": hashes["clip_text"]}
        return {"image": image, "text": text}
    made_by: dict[str, dict[str, str]] = {name: {"sha256": hashes[name]} for name in hashes}
    made_by["vae"]["kind"] = kind
    made_by["tokenizer"] = {"sha256": VOCABULARY_SHA256}
    declared = {name: array.model_dump(mode="json") for name, array in arrays.items()}
    return {"format": 2, "arrays": declared, "encoders": made_by, "image": image, "text": text}


def _image_settings(recipe: Recipe, encoders: Encoders) -> dict[str, Any]:
    return {
        "resolution": recipe.image.resolution,
        "resize": RESIZE,
        "draft": recipe.image.draft,
        "compute_batch_size": recipe.encoders.compute_batch_size,
        "precision": recipe.preprocess.encoder_precision,
        "device": encoders.device_kind,
        "versions": versions(),
    }


def _text_settings(recipe: Recipe) -> dict[str, Any]:
    # Chats are only encoded while training.
    stored = recipe.text.model_dump(exclude={"format", "roles"})
    return {"precision": recipe.preprocess.encoder_precision, **stored}


def _fits_format_1(arrays: Mapping[str, DeclaredArray]) -> bool:
    try:
        check_format_1({n: ArrayInfo(dtype=a.dtype, shape=a.shape) for n, a in arrays.items()})
    except ShardError:
        return False
    return True


def encoder_sha256(fingerprint: Mapping[str, Any], name: EncoderName) -> str | None:
    """Return the hash of an encoder's weights; None if the fingerprint does not name it.

    Shards that d2i preprocess did not make may have any fingerprint.
    """
    if declares_arrays(fingerprint):
        place, key = _mapping_in(fingerprint.get("encoders"), name), "sha256"
    else:
        place, key = _mapping_in(fingerprint, _PARTS[name]), name
    return str(place[key]) if key in place else None


def image_part(fingerprint: Mapping[str, Any], arrays: Mapping[str, ArrayInfo]) -> dict[str, Any]:
    """Return what determines the arrays of an image, alike for both formats."""
    part = dict(_mapping_in(fingerprint, "image"))
    if declares_arrays(fingerprint):
        vae = _mapping_in(fingerprint.get("encoders"), "vae")
        part |= {"vae": vae.get("sha256"), "vae_kind": vae.get("kind")}
        part |= {"clip_image": encoder_sha256(fingerprint, "clip_image")}
    shapes = {name: [arrays[name].dtype, *arrays[name].shape] for name in image_arrays(arrays)}
    return part | {"arrays": shapes}


def image_arrays(arrays: Mapping[str, ArrayInfo]) -> list[str]:
    """Return the names of those arrays that depend on the image alone."""
    made_by = {name: encoder_of(name, array) for name, array in arrays.items()}
    return [name for name, encoder in made_by.items() if _PARTS.get(encoder) == "image"]


def encoder_of(name: str, array: ArrayInfo) -> str:
    """Return the encoder that made an array, as its data set declares, or as in format 1."""
    if isinstance(array, DeclaredArray):
        return array.encoder
    return ENCODER_OF_ARRAY.get(name, "")


def check_encoder_hashes(
    hashes: Mapping[EncoderName, str], manifest: Manifest, data_url: str
) -> None:
    """Refuse encoders whose weights differ from those that made a data set.

    Shards that d2i preprocess did not make name no encoder, and are accepted unchecked.

    Args:
        hashes: sha256 of weights, by encoder.
        manifest: Manifest of the data set.
        data_url: URL of the data set.

    Raises:
        CheckpointError: If they differ; it names the encoder.
    """
    for name, found in hashes.items():
        expected = encoder_sha256(manifest.fingerprint, name)
        if expected not in (None, found):
            raise CheckpointError(
                f"encoders.{name}: got weights with sha256 {found[:16]}…; expected "
                f"{str(expected)[:16]}…, which prepared {data_url}; restore those weights, or "
                "prepare the data again"
            )


def _mapping_in(value: object, name: str) -> Mapping[str, Any]:
    found = value.get(name) if isinstance(value, Mapping) else None
    return found if isinstance(found, Mapping) else {}
