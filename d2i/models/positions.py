"""Position embeddings of published weights, fitted to a network of other sizes.

Longer text is our extension of the paper. CLIP restarts its own positions in every window of 77
tokens, so an extended network starts by doing the same, and fine-tuning may learn to distinguish
the windows. Other latent sizes are interpolated, as the published network does at run time.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from d2i.models.blocks import resize_positions
from d2i.tokenize import WINDOW_LENGTH

_MAX_WINDOWS = 4
# U-ViT at 256 px and UniDiffuser at 512 px: (text tokens, rows of patches).
_PUBLISHED = {77 + 16**2: (77, 16), 77 + 32**2: (77, 32)}


def fit_positions(state: Mapping[str, Tensor], network: Any) -> dict[str, Tensor]:
    """Fit `pos_embed` of weights to a network with more text windows or another latent size.

    Args:
        state: published tensors by name.
        network: a network with long skips, which is not changed.

    Returns:
        The same tensors, except `pos_embed` (1, tokens, D): its text part is repeated, its patch
        part interpolated. It is unchanged if the split into the two is ambiguous.
    """
    positions = state.get("pos_embed")
    if positions is None or positions.shape[1] == network.pos_embed.shape[1]:
        return dict(state)
    sizes = _sizes_before(positions.shape[1], network)
    if sizes is None:
        return dict(state)
    num_text, side = sizes
    first, end = network.num_time_tokens, network.num_time_tokens + num_text
    times, text = positions[:, :first], positions[:, first:end]
    clip, patches = positions[:, end : -(side**2)], positions[:, -(side**2) :]
    repeated = [text] * (network.num_text_tokens // num_text)
    new_side = network.latent_size // network.patch_size
    resized = resize_positions(patches, (side, side), (new_side, new_side))
    return dict(state) | {"pos_embed": torch.cat([times, *repeated, clip, resized], dim=1)}


def _sizes_before(num_positions: int, network: Any) -> tuple[int, int] | None:
    """Return (text tokens, rows of patches) that the weights were trained for; None if unclear."""
    side = network.latent_size // network.patch_size
    num_others = network.pos_embed.shape[1] - network.num_text_tokens - side**2
    num_both = num_positions - num_others
    num_new = network.num_text_tokens
    texts = [num_new // share for share in range(1, _MAX_WINDOWS + 1) if not num_new % share]
    for num_text in texts:
        if num_text + side**2 == num_both:
            return num_text, side
    found = read_positions(num_both)
    return found if found and found[0] in texts else None


def published_sizes(
    state: Mapping[str, Tensor], *, text: str, num_others: int
) -> dict[str, int] | None:
    """Read sizes off the shapes of a network with long skips; the heads are not among them.

    Args:
        state: published tensors by name.
        text: name of the projection of the text.
        num_others: positions that are neither text nor patches.

    Returns:
        Sizes by the names of `build_backbone`; None if the tensors are not of such a network.
    """
    num_axes = {"pos_embed": 3, "patch_embed.proj.weight": 4, text: 2}
    if any(key not in state or state[key].dim() != num for key, num in num_axes.items()):
        return None
    blocks = {match[1] for key in state if (match := re.match(r"in_blocks\.(\d+)\.", key))}
    patch_size = state["patch_embed.proj.weight"].shape[-1]
    num_tokens, dim = state["pos_embed"].shape[-2:]
    sizes = {"dim": dim, "depth": 2 * len(blocks), "patch_size": patch_size}
    sizes["text_dim"] = state[text].shape[-1]
    split = read_positions(num_tokens - num_others)
    if split is not None:
        sizes |= {"num_text_tokens": split[0], "latent_size": split[1] * patch_size}
    return sizes


def read_positions(num_both: int) -> tuple[int, int] | None:
    """Split a number of positions into whole text windows and a square of patches.

    Returns:
        (text tokens, rows of patches), preferably those of a published network. None if no split
        fits, or more than one does.
    """
    if num_both in _PUBLISHED:
        return _PUBLISHED[num_both]
    readings = [
        (num_text, math.isqrt(num_both - num_text))
        for num_text in range(WINDOW_LENGTH, _MAX_WINDOWS * WINDOW_LENGTH + 1, WINDOW_LENGTH)
        if _is_square(num_both - num_text)
    ]
    return readings[0] if len(readings) == 1 else None


def _is_square(number: int) -> bool:
    return number > 0 and math.isqrt(number) ** 2 == number
