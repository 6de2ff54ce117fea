"""Detection of the model that tensors belong to, by key names and shapes, never by file name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from d2i.models.registry import detect_architecture, detect_layout
from d2i.models.weights.autoencoder_layout import is_diffusers_autoencoder, is_ldm
from d2i.weights_catalog import PublishedFile, find_published

Kind = Literal["backbone", "autoencoder", "text prefix", "encoder"]
LayoutName = str
"""`published`, or the name of one of the family's layouts."""

PREFIX_KEYS = ("encode_prefix.weight", "encode_prefix.bias")
# Encoders that need no conversion: the keys that identify one, and its description.
_ENCODERS = (
    (("encoder.layers.0.weight", "decoder.layers.0.weight"), "tiny autoencoder (AutoencoderTiny)"),
    (("visual_projection.weight", "text_projection.weight"), "CLIP, images and text"),
    (("visual_projection.weight",), "CLIP's image encoder"),
    (("text_projection.weight",), "CLIP's text encoder"),
)


@dataclass(frozen=True)
class DetectedWeights:
    """The result of `detect_weights`.

    Args:
        kind: The kind of model.
        layout: The layout of its key names.
        words: A description for people, with sizes.
        published: The published files that have exactly these keys and shapes.
        backbone: The preset of its architecture, or None.
        sizes: The sizes of a backbone that its shapes reveal, by the names of `build_backbone`.
    """

    kind: Kind
    layout: LayoutName
    words: str
    published: tuple[PublishedFile, ...]
    backbone: str | None = None
    sizes: Mapping[str, int] | None = None


def detect_weights(state: Mapping[str, Tensor]) -> DetectedWeights | None:
    """Identify tensors by their names and shapes; None if d2i has no use for them.

    A caption decoder counts as its text prefix; its other tensors are ignored.
    """
    published = tuple(find_published({key: tuple(value.shape) for key, value in state.items()}))
    if is_ldm(state):
        return DetectedWeights(
            "autoencoder", "published", "KL autoencoder, LDM's layout", published
        )
    if is_diffusers_autoencoder(state):
        words = "KL autoencoder, diffusers' layout"
        return DetectedWeights("autoencoder", "diffusers", words, published)
    if all(key in state for key in PREFIX_KEYS):
        prefix = {key: tuple(state[key].shape) for key in PREFIX_KEYS}
        width = " to ".join(str(size) for size in reversed(prefix[PREFIX_KEYS[0]]))
        words = f"UniDiffuser's text prefix, {width} features"
        return DetectedWeights("text prefix", "published", words, tuple(find_published(prefix)))
    for keys, words in _ENCODERS:
        if all(key in state for key in keys):
            return DetectedWeights("encoder", "diffusers", words, published)
    return _backbone(state, published)


def published_names(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return tensors under their published names, from whatever layout they are in."""
    found = detect_layout(state)
    return found[1].to_published(state) if found else state


def _backbone(
    state: Mapping[str, Tensor], published: tuple[PublishedFile, ...]
) -> DetectedWeights | None:
    layout = detect_layout(state)
    found = detect_architecture(published_names(state))
    if found is None:
        return None
    name = next((file.backbone for file in published if file.backbone), found.backbone)
    words = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in found.sizes.items())
    theirs = f", {layout[0]}' layout" if layout else ""
    return DetectedWeights(
        "backbone",
        layout[0] if layout else "published",
        f"{found.title}{theirs}: {words}",
        published,
        name,
        found.sizes,
    )
