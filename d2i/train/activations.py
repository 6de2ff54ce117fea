"""The bytes that a forward pass keeps for the backward pass, counted without memory or a device.

The network runs on torch's fake tensors: they have the shape, dtype and device of real ones, and no
numbers. On the `meta` device alone, autocast would not act and attention not choose its kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from d2i.config import Recipe
from d2i.models.base import Family
from d2i.models.registry import family_of_backbone
from d2i.train.network import build_on_meta

_HALF = {"bf16_weights": torch.bfloat16, "fp16_weights": torch.float16}


@dataclass(frozen=True)
class Activations:
    """Bytes of one micro batch on one rank.

    Args:
        kept: From the forward pass to the backward pass.
        recomputed: With activation checkpointing: what the backward pass keeps beside that while it
            recomputes the block that keeps most.
    """

    kept: int
    recomputed: int = 0


def count_activations(recipe: Recipe, micro_batch_size: int, device_type: str) -> Activations:
    """Count the tensors that torch saves for the backward pass of a micro batch.

    Each distinct storage counts once, in whole; parameters and buffers do not count, copies of them
    in lower precision do. `torch.compile` would keep less.

    Args:
        recipe: Network, adapter, precision and activation checkpointing.
        micro_batch_size: Number of images.
        device_type: `cpu` or `cuda`: autocast and attention keep other tensors on each. It need not
            be there.

    Raises:
        CheckpointError: If the directory of the network's weights cannot be read.
        ConfigError: If the adapter does not fit the network.
        RuntimeError: If the network's forward pass depends on numbers, which fake tensors lack.
    """
    network, family = build_on_meta(recipe), family_of_backbone(recipe.backbone.name)
    if half := _HALF.get(recipe.train.precision):
        for tensor in filter(torch.is_floating_point, _tensors(network)):
            tensor.data = tensor.data.to(half)
    # The network's parameters are still on the meta device when `to_empty` reads them.
    with FakeTensorMode(allow_non_fake_inputs=True), ExitStack() as stack:
        network.to_empty(device=device_type)
        inputs = _inputs(family, network, micro_batch_size, device_type)
        if recipe.train.precision == "bf16":
            stack.enter_context(_autocast(device_type))
        if device_type != "cpu":
            stack.enter_context(_FusedAttention())
        kept, by_module = _run(family, network, inputs)
        if not recipe.train.activation_checkpointing:
            return Activations(kept)
        family.recompute_blocks(network)
        still_kept, still_by_module = _run(family, network, inputs)
        # A module that now keeps nothing is within a part that is recomputed as one.
        hidden = [by_module[name] for name, size in still_by_module.items() if not size]
        return Activations(still_kept, max(hidden, default=0))


def _tensors(network: nn.Module) -> list[Tensor]:
    return [*network.parameters(), *network.buffers()]


def _inputs(family: Family, network: Any, num_images: int, device_type: str) -> Any:
    """Return the network's inputs for some images, in the dtype that a loss gives them."""
    with torch.device(device_type):
        inputs = family.example_inputs(network)
    dtype = next(network.parameters()).dtype
    half = dtype if dtype in _HALF.values() else torch.float32

    def repeated(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        value = value.to(half) if value.is_floating_point() else value
        # What has no axis of one image is shared by all of them.
        is_batch = value.dim() > 0 and len(value) == 1
        return value.repeat(num_images, *[1] * (value.dim() - 1)) if is_batch else value

    listed = [value * num_images if isinstance(value, list) else value for value in inputs]
    return tree_map(repeated, listed)


def _run(family: Family, network: nn.Module, inputs: Any) -> tuple[int, dict[str, int]]:
    """Run the forward pass; return the bytes saved, and those first saved within each module."""
    held = {id(tensor.untyped_storage()) for tensor in _tensors(network)}
    saved: dict[int, Any] = {}
    by_module: dict[str, int] = {}
    total = 0

    def save(tensor: Tensor) -> Tensor:
        nonlocal total
        storage = tensor.untyped_storage()
        if id(storage) not in held and id(storage) not in saved:
            # Held, so that no other storage gets its id.
            saved[id(storage)] = storage
            total += storage.nbytes()
        return tensor

    with ExitStack() as stack:
        for name, module in network.named_modules():
            started: list[int] = []

            def begin(*_: Any, started: list[int] = started) -> None:
                started.append(total)

            def end(*_: Any, name: str = name, started: list[int] = started) -> None:
                by_module[name] = by_module.get(name, 0) + total - started.pop()

            for hook in (
                module.register_forward_pre_hook(begin),
                module.register_forward_hook(end),
            ):
                stack.callback(hook.remove)
        with saved_tensors_hooks(save, lambda tensor: tensor):
            output = family.call(network, *inputs)
        del output
    return total, by_module


@contextmanager
def _autocast(device_type: str) -> Iterator[None]:
    """Do as `torch.autocast` in bfloat16, which turns itself off where the device is not there."""
    enabled = torch.is_autocast_enabled(device_type)
    dtype, is_cached = torch.get_autocast_dtype(device_type), torch.is_autocast_cache_enabled()
    torch.set_autocast_enabled(device_type, True)
    torch.set_autocast_dtype(device_type, torch.bfloat16)
    torch.set_autocast_cache_enabled(False)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        torch.autocast_decrement_nesting()
        torch.set_autocast_enabled(device_type, enabled)
        torch.set_autocast_dtype(device_type, dtype)
        torch.set_autocast_cache_enabled(is_cached)


class _FusedAttention(TorchFunctionMode):
    """Takes a fused kernel for attention, as a GPU does; where none is there, torch takes none."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function of torch."""
        del types
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs or {})

        def run(
            query: Tensor,
            key: Tensor,
            value: Tensor,
            attn_mask: Tensor | None = None,
            *_: Any,
            **__: Any,
        ) -> Tensor:
            kernel = torch.ops.aten._scaled_dot_product_efficient_attention
            output: Tensor = kernel(query, key, value, attn_mask, compute_log_sumexp=True)[0]
            return output

        return run(*args, **kwargs or {})
