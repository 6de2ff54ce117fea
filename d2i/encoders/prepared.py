"""Check that encoders are those that prepared a data set, by the hashes of their weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from d2i.errors import CheckpointError

if TYPE_CHECKING:
    from d2i.shards import Manifest

EncoderName = Literal["vae", "clip_image", "clip_text"]

_PARTS = {"vae": "image", "clip_image": "image", "clip_text": "text"}
"""The part of a data set's fingerprint that holds the hash of each encoder's weights."""


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
    fingerprint: Mapping[str, Any] = manifest.fingerprint
    for name, found in hashes.items():
        part = fingerprint.get(_PARTS[name])
        expected = part.get(name, found) if isinstance(part, dict) else found
        if found != expected:
            raise CheckpointError(
                f"encoders.{name}: got weights with sha256 {found[:16]}…; expected "
                f"{str(expected)[:16]}…, which prepared {data_url}; restore those weights, or "
                "prepare the data again"
            )
