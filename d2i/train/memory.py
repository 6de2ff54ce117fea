"""The memory of a training, reckoned from its settings before anything is loaded onto a device.

What DeepSpeed keeps follows its ZeRO stage; the test of this module compares every part, to the
byte, with the tensors that exist (`tests/integration/test_reckoned_memory.py`).
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from d2i.backbones import presets_of
from d2i.config import Recipe, apply_settings
from d2i.errors import D2IError
from d2i.train.activations import Activations, count_activations
from d2i.train.data.text_source import text_encoder_bytes
from d2i.train.distributed.engine import with_zero_defaults, zero_settings
from d2i.train.network import build_on_meta

_FLOAT = 4
# DeepSpeed aligns the partitions of a flat buffer to this many elements (stages 1 and 2).
_ALIGNMENT = 2
# The elements that stage 0 copies together before ranks sum them.
_STAGE_0_BUCKET = 500_000_000


@dataclass(frozen=True)
class Memory:
    """Bytes on the device of one rank; where ranks differ, of the one that holds most.

    Args:
        weights: The network's parameters and buffers; in ZeRO stage 3 this rank's partitions, and
            the parameters that are gathered to compute.
        masters: Float32 copies that the optimizer updates, where they are not the weights.
        gradients: The most that exist at once.
        buckets: Buffers in which DeepSpeed sums gradients over ranks.
        moments: AdamW's two, and its step counts.
        ema: The moving averages, one or two.
        text_encoder: The text encoders, if text is encoded while training.
        activations: What the forward pass of a micro batch keeps; see `count_activations`.
        activations_per_sample: What one sample more would add.
        recomputed: What the backward pass adds with activation checkpointing.
        optimizer_step: Copies of the gradients after the backward pass, when the activations, what
            is recomputed and the buckets are gone.
    """

    weights: int
    masters: int
    gradients: int
    buckets: int
    moments: int
    ema: int
    text_encoder: int
    activations: int
    activations_per_sample: int
    recomputed: int
    optimizer_step: int

    @property
    def total(self) -> int:
        """The most that is held at once: in the backward pass, or in the step after it."""
        state = self.weights + self.masters + self.gradients + self.moments + self.ema
        passing = self.buckets + self.activations + self.recomputed
        return state + self.text_encoder + max(passing, self.optimizer_step)

    def describe(self) -> str:
        """Return the total and all parts, in GB (1e9 bytes), in one line."""
        values = dataclasses.asdict(self)
        sample = values.pop("activations_per_sample")
        sizes = {name.replace("_", " "): _gb(size) for name, size in values.items() if size}
        sizes["activations"] += f" ({_gb(sample)} a sample)"
        parts = ", ".join(f"{name} {size}" for name, size in sizes.items())
        return f"{_gb(self.total)} GB a rank: {parts}"


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f}" if size >= 5e6 else f"{size / 1e9:.1g}"


class MemoryReckoner:
    """Reckons the memory of recipes on the same ranks.

    Not counted: CUDA's context, fragments of the allocator, buffers of a single operation, the
    parts of ZeRO that `--zero` moves to the CPU, and the images sampled while training.

    Args:
        world_size: Number of ranks.
        device_type: `cpu` or `cuda`.
        zero: DeepSpeed's `zero_optimization` settings, in place of the recipe's stage.
        has_latents: True if the shards hold text latents.
    """

    def __init__(
        self,
        world_size: int,
        device_type: str,
        zero: Mapping[str, Any] | None = None,
        *,
        has_latents: bool = True,
    ) -> None:
        self._world_size, self._device_type = world_size, device_type
        self._zero, self._has_latents = zero, has_latents
        self._tensors: dict[str, _Tensors] = {}
        self._counted: dict[str, Activations] = {}

    def reckon(self, recipe: Recipe) -> Memory:
        """Return the memory of a training; no weights are loaded, and no device is used.

        Raises:
            CheckpointError: If the directory of the network or of a text encoder cannot be read.
            ConfigError: If the ranks cannot share the batch, or the settings do not fit each other.
            RuntimeError: If the activations cannot be counted; see `count_activations`.
        """
        config, is_cpu = recipe.train, self._device_type == "cpu"
        micro_batch_size, num_micro_batches = config.accumulation(self._world_size)
        settings = zero_settings(config, self._world_size, self._zero, is_cpu=is_cpu)
        layout = _Layout(
            self._tensors_of(recipe),
            with_zero_defaults(settings),
            self._world_size,
            is_accumulating=num_micro_batches > 1,
            can_offload=not is_cpu,
        )
        activations = self._count(recipe, micro_batch_size)
        more = self._count(recipe, micro_batch_size + 1)
        num_averages = 1 if config.short_ema_length is None else 2
        return Memory(
            **layout.parts(num_averages),
            text_encoder=text_encoder_bytes(recipe, has_latents=self._has_latents),
            activations=activations.kept,
            activations_per_sample=more.kept - activations.kept,
            recomputed=activations.recomputed,
        )

    def settings_that_fit(self, recipe: Recipe, num_bytes: int) -> tuple[str, ...] | None:
        """Return the fewest settings, as `--set` takes them, that make a training fit.

        One alone is preferred, in the order of `_candidates`: first those that change no result.

        Args:
            recipe: The recipe.
            num_bytes: The memory of the device of one rank.

        Returns:
            None if none of them helps, or not all of them together.
        """
        candidates = list(self._candidates(recipe))
        for setting in candidates:
            if self._fits(recipe, (setting,), num_bytes):
                return (setting,)
        taken: dict[str, str] = {}
        for setting in candidates:
            taken[setting.partition("=")[0]] = setting
            if self._fits(recipe, tuple(taken.values()), num_bytes):
                return self._without_needless(recipe, taken, num_bytes)
        return None

    def _without_needless(
        self, recipe: Recipe, taken: Mapping[str, str], num_bytes: int
    ) -> tuple[str, ...]:
        left = dict(taken)
        for name in taken:
            fewer = tuple(setting for other, setting in left.items() if other != name)
            if self._fits(recipe, fewer, num_bytes):
                del left[name]
        return tuple(left.values())

    def _fits(self, recipe: Recipe, settings: Sequence[str], num_bytes: int) -> bool:
        try:
            return self.reckon(apply_settings(recipe, settings)).total <= num_bytes
        except D2IError:
            # Such as ZeRO stage 3 with compiled blocks.
            return False

    def _candidates(self, recipe: Recipe) -> Iterator[str]:
        """Yield settings that take less memory, those that cost the least first."""
        config = recipe.train
        if not config.activation_checkpointing:
            yield "train.activation_checkpointing=true"
        is_encoding = presets_of(recipe.backbone.name).pipeline and recipe.text.encode != "stored"
        if is_encoding and config.text_encoder_memory != "free":
            yield "train.text_encoder_memory=free"
        size = config.accumulation(self._world_size)[0]
        while size > 1:
            smaller = config.model_copy(update={"micro_batch_size": size // 2})
            size = smaller.accumulation(self._world_size)[0]
            yield f"train.micro_batch_size={size}"
        if self._world_size > 1 and self._zero is None:
            yield from (f"train.zero_stage={n}" for n in (2, 3) if n > config.zero_stage)
        if config.short_ema_length is not None:
            yield "train.short_ema_length=null"
        if recipe.adapter.kind is None and presets_of(recipe.backbone.name).lora_targets:
            yield "adapter.kind=lora"

    def _tensors_of(self, recipe: Recipe) -> _Tensors:
        key = f"{recipe.backbone} {recipe.adapter} {recipe.train.precision}"
        if key not in self._tensors:
            self._tensors[key] = _Tensors.of(build_on_meta(recipe), recipe.train.precision)
        return self._tensors[key]

    def _count(self, recipe: Recipe, size: int) -> Activations:
        is_checkpointed, precision = recipe.train.activation_checkpointing, recipe.train.precision
        key = f"{recipe.backbone} {recipe.adapter} {precision} {is_checkpointed} {size}"
        if key not in self._counted:
            self._counted[key] = count_activations(recipe, size, self._device_type)
        return self._counted[key]


@dataclass(frozen=True)
class _Tensors:
    """A network's tensors, as an engine holds them.

    Args:
        trained: Elements of every parameter that requires a gradient, in the network's order.
        size: Bytes of one of their elements.
        frozen: Elements of every other parameter, and the bytes of one.
        buffers: Bytes of all buffers.
    """

    trained: tuple[int, ...]
    size: int
    frozen: tuple[tuple[int, int], ...]
    buffers: int

    @classmethod
    def of(cls, network: Any, precision: str) -> _Tensors:
        half = 2 if precision.endswith("_weights") else None

        def size(tensor: Any) -> int:
            # DeepSpeed casts all that is no integer.
            is_cast = half is not None and tensor.is_floating_point()
            return half if half and is_cast else int(tensor.element_size())

        parameters = list(network.parameters())
        return cls(
            tuple(p.numel() for p in parameters if p.requires_grad),
            half or _FLOAT,
            tuple((p.numel(), size(p)) for p in parameters if not p.requires_grad),
            sum(b.numel() * size(b) for b in network.buffers()),
        )


class _Layout:
    """The tensors that DeepSpeed's engine keeps of a network in a ZeRO stage."""

    def __init__(
        self,
        tensors: _Tensors,
        zero: Any,
        world_size: int,
        *,
        is_accumulating: bool,
        can_offload: bool,
    ) -> None:
        self._tensors, self._zero, self._world_size = tensors, zero, world_size
        self._is_accumulating = is_accumulating
        self._stage = int(zero.stage)
        self._is_offloaded = can_offload and _is_set(zero.offload_optimizer)
        self._has_weights_off = can_offload and _is_set(zero.offload_param)

    def parts(self, num_averages: int) -> dict[str, int]:
        """Return the entries of `Memory` that depend on the stage."""
        owned, num_masters = self._owned(), self._num_masters()
        has_copies = self._stage > 0 or self._tensors.size < _FLOAT
        state = {
            "masters": owned * _FLOAT if has_copies else 0,
            "gradients": self._gradients(),
            "moments": 2 * owned * _FLOAT + num_masters * _FLOAT,
            "ema": num_averages * owned * _FLOAT,
            "optimizer_step": owned * _FLOAT if has_copies else self._stage_0_copy(),
        }
        if self._is_offloaded:
            state = dict.fromkeys(state, 0)
        return state | {"weights": self._weights(), "buckets": self._buckets()}

    def _owned(self) -> int:
        """Return the elements that this rank's optimizer updates, with those that pad them."""
        trained = self._tensors.trained
        if self._stage == 0:
            return sum(trained)
        if self._stage == 3:
            return sum(self._divided(number) for number in trained)
        return self._flat() // self._world_size

    def _divided(self, number: int) -> int:
        """Return the elements of one parameter that a rank holds in stage 3."""
        return -(-number // self._world_size)

    def _flat(self) -> int:
        """Return the elements of the flat buffer of stages 1 and 2, which is padded at its end."""
        step = _ALIGNMENT * self._world_size
        return -(-sum(self._tensors.trained) // step) * step

    def _num_masters(self) -> int:
        """Return the number of tensors that the optimizer updates, each with a step count."""
        if self._stage == 0:
            return len(self._tensors.trained)
        if self._stage < 3:
            return 1
        number, filled = 0, 0
        for elements in map(self._divided, self._tensors.trained):
            filled += elements
            if filled >= self._zero.sub_group_size:
                number, filled = number + 1, 0
        return number + (filled > 0)

    def _weights(self) -> int:
        tensors = self._tensors
        if self._stage < 3:
            trained = self._flat() if self._stage else sum(tensors.trained)
            frozen = sum(number * size for number, size in tensors.frozen)
            return trained * tensors.size + frozen + tensors.buffers
        sized = [*((number, tensors.size) for number in tensors.trained), *tensors.frozen]
        held = sum(self._divided(number) * size for number, size in sized)
        return (0 if self._has_weights_off else held) + self._gathered(sized) + tensors.buffers

    def _gathered(self, sized: Sequence[tuple[int, int]]) -> int:
        """Return the bytes of whole parameters in stage 3: the small ones stay, others by limit.

        DeepSpeed pads those that it gathers alone to a multiple of the ranks, which is not counted.
        """
        if self._world_size == 1 and not self._has_weights_off:
            # The one partition is the whole parameter.
            return 0
        smallest = int(self._zero.param_persistence_threshold)
        persistent = sum(number * size for number, size in sized if number <= smallest)
        others = [(number, size) for number, size in sized if number > smallest]
        largest = max((size for _, size in others), default=0)
        limit = largest * int(self._zero.max_live_parameters)
        return persistent + min(sum(number * size for number, size in others), limit)

    def _gradients(self) -> int:
        tensors = self._tensors
        if self._stage < 2:
            return sum(tensors.trained) * tensors.size
        if self._stage == 3:
            return self._owned() * tensors.size
        # Those of earlier micro batches are kept beside those of this one.
        num_sets = 2 if self._is_accumulating else 1
        return max(
            (num_sets * touched + padding) * tensors.size
            for touched, padding in map(self._partition, range(self._world_size))
        )

    def _partition(self, rank: int) -> tuple[int, int]:
        """Return the elements of the parameters that a rank's partition touches, and its padding.

        In stage 2 a rank keeps the whole gradient of each of them.
        """
        size = self._owned()
        start, stop = rank * size, (rank + 1) * size
        touched = position = 0
        for number in self._tensors.trained:
            if position < stop and position + number > start:
                touched += number
            position += number
        return touched, min(size, max(0, stop - position))

    def _buckets(self) -> int:
        if self._stage == 0:
            return 0
        bucket = int(self._zero.reduce_bucket_size) * self._tensors.size
        if self._stage == 3:
            return bucket
        # Where the optimizer is on the CPU, a gradient passes through a buffer of its own.
        passing = max(self._tensors.trained) * self._tensors.size if self._is_offloaded else 0
        return bucket * (2 if self._zero.overlap_comm else 1) + passing

    def _stage_0_copy(self) -> int:
        """Return the bytes that are copied into one tensor for the sum over ranks."""
        if self._world_size == 1:
            return 0
        return min(sum(self._tensors.trained), _STAGE_0_BUCKET) * self._tensors.size


def _is_set(offload: Any) -> bool:
    return offload is not None and str(offload.device) != "none"


def device_memory(device: torch.device, num_ranks: int) -> int:
    """Return the bytes that a rank may use: what a GPU has free, or a share of the CPU's memory.

    Args:
        device: The device of the rank.
        num_ranks: Ranks on this machine, which share the memory of the CPU.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // num_ranks


def memory_problem(memory: Memory, num_bytes: int, settings: tuple[str, ...] | None) -> str | None:
    """Return why a training does not fit, and what makes it fit, in one line; None if it fits.

    Args:
        memory: What it takes.
        num_bytes: The memory of the device of one rank.
        settings: As `settings_that_fit` returns them.
    """
    if memory.total <= num_bytes:
        return None
    found = f"memory: got {memory.describe()}; expected at most {_gb(num_bytes)} GB"
    if settings is None:
        return f"{found}; no setting makes it fit: use a larger device, or more of them"
    return f"{found}; use {' '.join(f'--set {setting}' for setting in settings)}"
