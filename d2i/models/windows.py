"""Longer contexts than the published networks read: text positions for more than one window.

Beyond the paper (ours). CLIP counts its own positions anew in every window of 77 tokens; so does a
grown network to begin with, and fine-tuning may tell the windows apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def grow_text_positions(state: Mapping[str, Tensor], network: Any) -> dict[str, Tensor]:
    """Repeat the text positions of weights for a network that reads more text tokens.

    Args:
        state: published tensors by name, of a network with as many text tokens or fewer.
        network: a `UViT` or `UniDiffuser`, which is not changed.

    Returns:
        The same tensors, but for `pos_embed` (1, tokens, D) where the network has 2, 3, ... times
        as many text tokens; what cannot be grown is left as it is.
    """
    positions = state.get("pos_embed")
    if positions is None:
        return dict(state)
    num_new = network.num_text_tokens
    num_old = positions.shape[1] - (network.pos_embed.shape[1] - num_new)
    if num_old <= 0 or num_old == num_new or num_new % num_old:
        return dict(state)
    times, text, others = positions.split(
        [network.num_time_tokens, num_old, positions.shape[1] - network.num_time_tokens - num_old],
        dim=1,
    )
    grown = torch.cat([times, *[text] * (num_new // num_old), others], dim=1)
    return dict(state) | {"pos_embed": grown}
