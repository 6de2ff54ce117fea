"""The network as training takes it: the recipe's, its blocks computed again or compiled."""

from __future__ import annotations

from typing import Any

from d2i.config import Recipe
from d2i.models.folder import build_network


def build_trained_network(recipe: Recipe) -> Any:
    """Return the recipe's network in float32, with its first weights.

    Raises:
        CheckpointError: If the weights to start from cannot be loaded.
    """
    network: Any = build_network(recipe.backbone)
    network.gradient_checkpointing = recipe.train.activation_checkpointing
    if recipe.train.compile:
        compile_blocks(network)
    return network


def compile_blocks(network: Any) -> None:
    """Have each block compiled by `torch.compile` when it is first called; no key changes.

    Block by block, as all blocks share the code of one: compiling takes a tenth of the time that
    the network as a whole takes (ours), and nearly all that can be fused lies within a block.
    Every shape is compiled for itself: one code for all shapes would depend on which came first,
    and a resumed run would then not be the undisturbed one to the bit.

    Args:
        network: A U-ViT or UniDiffuser.
    """
    for block in (*network.in_blocks, network.mid_block, *network.out_blocks):
        block.compile(fullgraph=True, dynamic=False)
