"""The network as training takes it: the recipe's, its blocks computed again or compiled."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from d2i.config import Recipe, TrainPrecision
from d2i.encoders.load import multiplied_in
from d2i.models.model_dir import build_network


def build_trained_network(recipe: Recipe) -> Any:
    """Return the recipe's network in float32, with its first weights.

    Raises:
        CheckpointError: If the weights to start from cannot be loaded.
    """
    network: Any = build_network(recipe.backbone)
    network.gradient_checkpointing = recipe.train.activation_checkpointing
    autocast_to(network, recipe.train.precision)
    if recipe.train.compile:
        compile_blocks(network)
    return network


def autocast_to(network: Any, precision: TrainPrecision) -> None:
    """Have a network in float32 multiply in a precision, by torch's autocast; no key changes.

    Autocast is entered within the network's own call, as accelerate does for the published program:
    outside of it DeepSpeed would leave it again. The loss is taken outside, in float32.

    Args:
        network: A U-ViT or UniDiffuser in float32.
        precision: `fp32` changes nothing, nor does one that DeepSpeed casts the weights to.
    """
    if precision != "bf16":
        return
    forward = network.forward

    def multiplied(latent: Tensor, *inputs: Any) -> Any:
        with multiplied_in("bf16", latent.device.type):
            return forward(latent, *inputs)

    network.forward = multiplied


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
