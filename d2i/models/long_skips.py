"""The part of a family that U-ViT and UniDiffuser share: long skips, and learned positions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from d2i.models.base import Family
from d2i.models.positions import fit_positions
from d2i.models.weights.load import fill_network, read_published


class LongSkipFamily(Family):
    """A family of transformers with long skips."""

    def load(self, path: str, network: nn.Module) -> nn.Module:
        """Load published weights; positions are fitted to more windows or another latent size."""
        return fill_network(network, fit_positions(read_published(path), network), path)

    def blocks(self, network: Any) -> Iterator[nn.Module]:
        """Yield all blocks, in the order of the forward pass."""
        yield from network.in_blocks
        yield network.mid_block
        yield from network.out_blocks
