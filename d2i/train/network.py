"""The network to train, with autocast, activation checkpointing and compiled blocks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from d2i.config import Recipe, TrainPrecision
from d2i.encoders.pretrained import matmul_precision
from d2i.errors import CheckpointError
from d2i.models.lora import add_lora
from d2i.models.model_dir import build_network, build_untrained
from d2i.models.registry import family_of_backbone


def build_trained_network(recipe: Recipe) -> Any:
    """Return the recipe's network in float32, with its initial weights, and its adapter if any.

    What an adapter leaves frozen is held in bfloat16, unless the precision is float32.

    Raises:
        CheckpointError: If the initial weights cannot be loaded.
        ConfigError: If the adapter does not fit the network.
    """
    network: Any = build_network(recipe.backbone)
    family = family_of_backbone(recipe.backbone.name)
    _add_adapter(network, recipe)
    if recipe.train.activation_checkpointing:
        family.recompute_blocks(network)
    autocast_to(network, recipe.train.precision)
    if recipe.train.compile:
        compile_blocks(family.blocks(network))
    return network


def build_on_meta(recipe: Recipe) -> Any:
    """Return the recipe's network and adapter on the `meta` device, which holds no numbers.

    Its parameters have the shapes and dtypes of those that `build_trained_network` returns. It
    multiplies in no lower precision, and recomputes and compiles no block.

    Raises:
        CheckpointError: If the directory of its weights cannot be read.
        ConfigError: If the adapter does not fit the network.
    """
    with torch.device("meta"):
        network: Any = build_untrained(recipe.backbone)
    _add_adapter(network, recipe)
    return network


def _add_adapter(network: Any, recipe: Recipe) -> None:
    if recipe.adapter.kind:
        presets = family_of_backbone(recipe.backbone.name).presets
        add_lora(network, recipe.adapter, presets, recipe.train.seed)
        _halve_frozen(network, recipe.train.precision)


def _halve_frozen(network: nn.Module, precision: TrainPrecision) -> None:
    """Hold the parameters that are not trained in bfloat16, in which their products are taken."""
    if precision not in ("bf16", "bf16_weights"):
        return
    for parameter in network.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)


def build_with_trained(recipe: Recipe, weights: Mapping[str, Tensor]) -> nn.Module:
    """Return the recipe's network in float32 with weights that training left in a checkpoint.

    Raises:
        CheckpointError: If the initial weights, which an adapter needs too, cannot be loaded.
    """
    if recipe.adapter.kind is None:
        with torch.device("meta"):
            whole = build_untrained(recipe.backbone)
        whole.load_state_dict(weights, assign=True)
        return whole
    network = build_network(recipe.backbone)
    presets = family_of_backbone(recipe.backbone.name).presets
    add_lora(network, recipe.adapter, presets, recipe.train.seed)
    load_trained(network, weights)
    return network


def load_trained(network: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load the weights of a checkpoint: those of every parameter that requires a gradient.

    Raises:
        CheckpointError: If they are not those of the network.
    """
    trained = {name for name, p in network.named_parameters() if p.requires_grad}
    if trained != weights.keys():
        first = min(trained ^ weights.keys())
        raise CheckpointError(
            f"the checkpoint has {len(weights)} tensors, expected the {len(trained)} that the "
            f"network trains; the first that differs is {first}; use the recipe that the run was "
            "started with, or another --run"
        )
    network.load_state_dict(weights, strict=False)


def autocast_to(network: Any, precision: TrainPrecision) -> None:
    """Make a float32 network multiply in a precision, by torch's autocast; no key changes.

    Autocast is entered inside the network's forward call, as accelerate does for the published
    program: DeepSpeed would undo it outside. The loss is computed outside, in float32.

    Args:
        network: A network in float32.
        precision: `bf16` turns autocast on. The others change nothing here: they are `fp32`, and
            those in which DeepSpeed casts the weights.
    """
    if precision != "bf16":
        return
    forward = network.forward

    def multiplied(*inputs: Any, **options: Any) -> Any:
        device = next(network.parameters()).device
        with matmul_precision("bf16", device.type):
            return forward(*inputs, **options)

    network.forward = multiplied


def compile_blocks(blocks: Iterable[nn.Module]) -> None:
    """Compile each block with `torch.compile` when it is first called; no key changes.

    Blocks are compiled one by one because they all share the code of one: in our measurement it
    takes a tenth of the time of compiling the whole network, and nearly all that can be fused lies
    within a block. Each shape is compiled separately: code for all shapes would depend on which
    came first, and a resumed run would not match an uninterrupted one bit for bit.

    Args:
        blocks: Of one network, as `Family.blocks` returns them.
    """
    for block in blocks:
        block.compile(fullgraph=True, dynamic=False)
