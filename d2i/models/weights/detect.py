"""Detection of the model that tensors belong to, by key names and shapes, never by file name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from d2i.models.positions import read_positions
from d2i.models.weights.autoencoder_layout import is_diffusers_autoencoder, is_ldm
from d2i.models.weights.diffusers_layout import from_diffusers, is_diffusers
from d2i.weights_catalog import PublishedFile, find_published

Kind = Literal["backbone", "autoencoder", "text prefix", "encoder"]
Layout = Literal["published", "diffusers"]

PREFIX_KEYS = ("encode_prefix.weight", "encode_prefix.bias")
# Encoders that need no conversion: the keys that identify one, and its description.
_ENCODERS = (
    (("encoder.layers.0.weight", "decoder.layers.0.weight"), "tiny autoencoder (AutoencoderTiny)"),
    (("visual_projection.weight", "text_projection.weight"), "CLIP, images and text"),
    (("visual_projection.weight",), "CLIP's image encoder"),
    (("text_projection.weight",), "CLIP's text encoder"),
)
# Number of axes of the tensors whose shapes are read.
_NUM_AXES = {
    "pos_embed": 3,
    "patch_embed.proj.weight": 4,
    "context_embed.weight": 2,
    "text_embed.weight": 2,
    "clip_img_embed.weight": 2,
}
# Tokens that are neither text nor patches.
_NUM_UVIT_TOKENS = 1
_NUM_UNIDIFFUSER_TOKENS = 3


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
    layout: Layout
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
    if is_diffusers(state):
        return _backbone(from_diffusers(state), "diffusers", published)
    return _backbone(state, "published", published)


def _backbone(
    state: Mapping[str, Tensor], layout: Layout, published: tuple[PublishedFile, ...]
) -> DetectedWeights | None:
    if "pos_embed" not in state or "patch_embed.proj.weight" not in state:
        return None
    if any(state[key].dim() != num for key, num in _NUM_AXES.items() if key in state):
        return None
    if "context_embed.weight" in state:
        name, title = "uvit-s", "U-ViT, text to image"
    elif "clip_img_embed.weight" in state and "text_embed.weight" in state:
        version = "v1" if "token_embedding.weight" in state else "v0"
        name, title = f"unidiffuser-{version}", f"UniDiffuser {version}"
    else:
        return None
    name = next((file.backbone for file in published if file.backbone), name)
    sizes = _sizes(state)
    words = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in sizes.items())
    theirs = ", diffusers' layout" if layout == "diffusers" else ""
    return DetectedWeights("backbone", layout, f"{title}{theirs}: {words}", published, name, sizes)


def _sizes(state: Mapping[str, Tensor]) -> dict[str, int]:
    """Return the sizes that the shapes reveal; the number of heads is not among them."""
    is_uvit = "context_embed.weight" in state
    text_weight = state["context_embed.weight" if is_uvit else "text_embed.weight"]
    blocks = {match[1] for key in state if (match := re.match(r"in_blocks\.(\d+)\.", key))}
    patch_size = state["patch_embed.proj.weight"].shape[-1]
    num_tokens, dim = state["pos_embed"].shape[-2:]
    sizes = {"dim": dim, "depth": 2 * len(blocks), "patch_size": patch_size}
    sizes["text_dim"] = text_weight.shape[-1]
    if not is_uvit:
        sizes["clip_dim"] = state["clip_img_embed.weight"].shape[-1]
    num_others = _NUM_UVIT_TOKENS if is_uvit else _NUM_UNIDIFFUSER_TOKENS
    read = read_positions(num_tokens - num_others)
    if read is not None:
        sizes |= {"num_text_tokens": read[0], "latent_size": read[1] * patch_size}
    return sizes
