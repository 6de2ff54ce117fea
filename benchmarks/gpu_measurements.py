"""The measurements of gpu.py, one after the other in this process.

    python benchmarks/gpu_measurements.py --device cpu --size toy --seconds 30 "uvit-s: sampling"

Runs all measurements if no names are given. Each gets a share of the seconds. Prints a JSON line
when a measurement begins, for each row, and when it ends; messages of libraries go to stderr. Exits
with status 3 after a failure that may have left the device unusable: the next measurement needs a
new process. On a CPU it computes with one thread, as each rank of training does.

To add a network, add an entry to `BACKBONES`. All networks have random weights, which do not affect
speed, at their published sizes (`--size full`). FLOPs are counted by torch's `FlopCounterMode`, 2
per multiply-add, without recomputation in the backward pass.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from itertools import count, pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

FAILED = 3
GIB = 2**30
LEAST_REPEATS, MOST_REPEATS = 3, 20
LINK_NUMBERS = {"full": 1 << 28, "toy": 1 << 20}

Row = dict[str, Any]
Emit = Callable[[Row], None]


@dataclass(frozen=True)
class Training:
    """A training configuration.

    Args:
        precision: `autocast` computes in bf16 with float32 weights; `bf16` has the whole network in
            bf16, with float32 master weights for AdamW; `fp32` is float32 without TF32.
        first_batch: Images per batch of the first row; each further row doubles it.
        is_compiled: Compile block by block, as `train.compile` does.
        is_recomputed: Recompute activations, as `train.activation_checkpointing` does.
        weight: Its share of the time.
    """

    precision: str
    first_batch: int
    is_compiled: bool = False
    is_recomputed: bool = False
    weight: float = 3

    @property
    def title(self) -> str:
        """Its name in the table."""
        compiled = ", compiled" if self.is_compiled else ""
        return f"{self.precision}{', recomputed' if self.is_recomputed else ''}{compiled}"


@dataclass(frozen=True, eq=False)
class Backbone:
    """A network of the project and its measurements.

    Args:
        name: The backbone name of recipes, which determines the published size.
        toy: Sizes for a check on a CPU.
        trainings: The training configurations to measure.
        engine_batch: Images per step with DeepSpeed.
        guidance_scale: The guidance scale of its published sampling.
        sample_batch: Images generated per batch, `sample.compute_batch_size`.
        sample_precisions: The precisions of sampling.
        reader_batch: Samples per batch that is read.
    """

    name: str
    toy: dict[str, int]
    trainings: tuple[Training, ...]
    engine_batch: int
    guidance_scale: float
    sample_batch: int
    sample_precisions: tuple[str, ...]
    reader_batch: int

    @property
    def family(self) -> Any:
        """Its family, as training and sampling take it."""
        from d2i.models.registry import family_of_backbone

        return family_of_backbone(self.name)


BACKBONES = (
    Backbone(
        "uvit-s",
        toy={"dim": 32, "depth": 2, "num_heads": 2, "latent_size": 8, "text_dim": 32},
        trainings=(
            Training("autocast", 64),
            Training("autocast", 256, is_compiled=True, weight=5),
            Training("bf16", 64),
            Training("fp32", 64, weight=1),
        ),
        engine_batch=256,
        guidance_scale=2.0,
        sample_batch=50,
        sample_precisions=("bf16", "fp32"),
        reader_batch=256,
    ),
    Backbone(
        "unidiffuser-v1",
        toy={"dim": 32, "depth": 2, "num_heads": 2, "latent_size": 8, "clip_dim": 32},
        trainings=(
            Training("autocast", 4),
            Training("autocast", 16, is_recomputed=True),
            Training("autocast", 8, is_compiled=True, weight=5),
            Training("bf16", 4),
        ),
        engine_batch=8,
        guidance_scale=8.0,
        sample_batch=8,
        sample_precisions=("bf16",),
        reader_batch=64,
    ),
)


class OutOfTimeError(Exception):
    """The remaining seconds of a measurement are too few for the next row."""


class Budget:
    """The wall-clock time limit of a measurement."""

    def __init__(self, seconds: float) -> None:
        self._end = time.perf_counter() + seconds

    @property
    def left_s(self) -> float:
        """Remaining seconds; negative after the deadline."""
        return self._end - time.perf_counter()


@dataclass(frozen=True)
class Place:
    """The device and the size of the measurements."""

    device: str
    size: str

    @property
    def is_cuda(self) -> bool:
        """True for a CUDA device, which computes asynchronously."""
        return self.device == "cuda"

    @property
    def is_toy(self) -> bool:
        """True for small sizes, to check that everything runs."""
        return self.size == "toy"

    def sizes(self, backbone: Backbone) -> dict[str, int]:
        """Return the sizes that differ from the published network."""
        return backbone.toy if self.is_toy else {}

    def wait(self) -> None:
        """Wait until the device has finished all submitted work."""
        import torch

        if self.is_cuda:
            torch.cuda.synchronize()

    def clear(self) -> None:
        """Free cached memory, and reset its peak."""
        import torch

        if self.is_cuda:
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak_gib(self) -> float | None:
        """Return the peak device memory of tensors since `clear`."""
        import torch

        return torch.cuda.max_memory_allocated() / GIB if self.is_cuda else None


@dataclass
class Timing:
    """Seconds of each repeat, and of the first call, which is not among them."""

    first_s: float
    seconds: list[float] = field(default_factory=list)

    @property
    def median_s(self) -> float:
        """The median of the repeats."""
        return statistics.median(self.seconds)


def timed(
    call: Callable[[], object],
    place: Place,
    budget: Budget,
    share: float = 1,
    most: int | None = None,
) -> Timing:
    """Time a call by device events, so that the host prepares the next call meanwhile.

    Args:
        call: The call to time, after two warm-up calls.
        place: The device and size.
        budget: The time limit of the measurement.
        share: The share of the remaining time to use.
        most: The maximum number of repeats; None for the default of the size.

    Raises:
        OutOfTimeError: If the fewest repeats do not fit.
    """
    first_s = _seconds(call, place)
    once_s = _seconds(call, place)
    if LEAST_REPEATS * once_s > budget.left_s:
        raise OutOfTimeError(f"{LEAST_REPEATS} of {once_s:.2g} s each are more than what was left")
    most = most or (LEAST_REPEATS if place.is_toy else MOST_REPEATS)
    num = min(most, max(LEAST_REPEATS, int(share * budget.left_s / max(once_s, 1e-9))))
    return Timing(first_s, _event_seconds(call, num) if place.is_cuda else _repeats(call, num))


def _seconds(call: Callable[[], object], place: Place) -> float:
    place.wait()
    started = time.perf_counter()
    call()
    place.wait()
    return time.perf_counter() - started


def _repeats(call: Callable[[], object], num: int) -> list[float]:
    marks = [time.perf_counter()]
    for _ in range(num):
        call()
        marks.append(time.perf_counter())
    return [end - start for start, end in pairwise(marks)]


def _event_seconds(call: Callable[[], object], num: int) -> list[float]:
    import torch

    events = [torch.cuda.Event(enable_timing=True) for _ in range(num + 1)]
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) / 1000 for a, b in pairwise(events)]


def measured(label: str, timing: Timing, **figures: Any) -> Row:
    """Return a row: the duration, and rates for `count`, `flop` and `num_bytes` if given.

    Args:
        label: The row's name within its measurement.
        timing: The timing of the repeats.
        **figures: `count` and `unit` of the output of a repeat; its `flop` and `num_bytes`;
            `ceiling`, the peak rate to compare with; others are copied into the row.
    """
    seconds = timing.seconds
    row: Row = {"row": label, "state": "measured", "first_s": _short(timing.first_s)}
    row["ms"] = {
        "median": _short(1000 * timing.median_s),
        "least": _short(1000 * min(seconds)),
        "most": _short(1000 * max(seconds)),
        "num": len(seconds),
    }
    for name, key, unit in (
        ("count", "a_second", 1.0),
        ("flop", "tflop_per_s", 1e12),
        ("num_bytes", "gb_per_s", 1e9),
    ):
        if name in figures:
            row[key] = _short(figures.pop(name) / timing.median_s / unit)
    rest = {key: _short(v) if isinstance(v, float) else v for key, v in figures.items()}
    return row | rest


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def missed(label: str, state: str, reason: str) -> Row:
    """Return a row without figures, with the reason."""
    return {"row": label, "state": state, "reason": reason}


# --- What the device can do -----------------------------------------------------------------------


def measure_matrix_rate(place: Place, budget: Budget, emit: Emit) -> None:
    """Multiply random square matrices; the fastest of several sizes gives the rate."""
    import torch

    sizes = (64, 128, 256) if place.is_toy else (4096, 8192, 16384)
    kinds = {"bf16": torch.bfloat16, "tf32": torch.float32, "fp32": torch.float32}
    for number, (kind, dtype) in enumerate(kinds.items()):
        if kind == "tf32" and not place.is_cuda:
            emit(missed(kind, "unmeasured", "TF32 is a matter of CUDA devices"))
            continue
        torch.set_float32_matmul_precision("high" if kind == "tf32" else "highest")
        best: Row = {}
        for size in sizes:
            left, right = torch.randn(2, size, size, device=place.device, dtype=dtype)
            product = torch.empty_like(left)
            call = partial(torch.mm, left, right, out=product)
            timing = timed(call, place, budget, 1 / (3 * (3 - number)), MOST_REPEATS)
            row = measured(kind, timing, flop=2 * size**3, sets=kind, size=size)
            best = max(best, row, key=lambda found: found.get("tflop_per_s", 0))
        torch.set_float32_matmul_precision("highest")
        emit(best)


def measure_bandwidth(place: Place, budget: Budget, emit: Emit) -> None:
    """Copy one large tensor of the device to another: bytes read and bytes written."""
    import torch

    source = torch.randn(1 << (22 if place.is_toy else 29), device=place.device)
    target = torch.empty_like(source)
    timing = timed(lambda: target.copy_(source), place, budget, most=MOST_REPEATS)
    num_bytes = 2 * source.numel() * source.element_size()
    emit(measured("copy, read and written", timing, num_bytes=num_bytes, sets="memory"))


def measure_link(place: Place, budget: Budget, emit: Emit) -> None:
    """Copy from the machine's memory, pinned where there is a device, to the device's."""
    import torch

    source = torch.zeros(LINK_NUMBERS[place.size], dtype=torch.float32)
    if place.is_cuda:
        source = source.pin_memory()
    target = torch.empty_like(source, device=place.device)
    call = partial(target.copy_, source, non_blocking=True)
    timing = timed(call, place, budget, most=MOST_REPEATS)
    label = "pinned memory to device" if place.is_cuda else "memory to memory"
    emit(measured(label, timing, num_bytes=source.numel() * source.element_size(), sets="link"))


# --- Training -------------------------------------------------------------------------------------


def build(backbone: Backbone, place: Place) -> Any:
    """Build a network with random weights directly on the device."""
    import torch

    from d2i.models import build_backbone

    torch.manual_seed(0)
    with torch.device(place.device):
        return build_backbone(backbone.name, **place.sizes(backbone))


def draw_batch(network: Any, backbone: Backbone, size: int, device: str) -> Any:
    """Draw a training batch on the device: normal numbers, times in 1..1000."""
    import torch

    from d2i.train.data.batch import Batch

    side, num_tokens = network.latent_size, network.num_text_tokens
    normal = partial(torch.randn, device=device)
    conditions = {"text": normal(size, num_tokens, network.text_dim)}
    if "clip" in backbone.family.encoders:
        conditions |= {
            "clip": normal(size, 1, network.clip_dim),
            "clip_noise": normal(size, 1, network.clip_dim),
            "text_noise": normal(size, num_tokens, network.text_dim),
            "n_text": torch.randint(1, 1001, (size,), device=device),
        }
    return Batch(
        keys=("",) * size,
        image=normal(size, 8, side, side),
        latent_noise=normal(size, 4, side, side),
        noise=normal(size, 4, side, side),
        draw=torch.randint(0, 1000, (size,), device=device),
        conditions=conditions,
    )


def objective_of(backbone: Backbone, network: Any) -> Callable[[Any, Any], Any]:
    """Return the training loss function of the network."""
    from d2i.config import TrainConfig
    from d2i.train.objective import build_objective

    config = TrainConfig(num_steps=1, global_batch_size=1, micro_batch_size=1)
    vae = backbone.family.vae_numbers(network)
    return build_objective(backbone.family, vae, config)


def build_adamw(parameters: Sequence[Any]) -> Any:
    """Return AdamW as training sets it up."""
    import torch

    from d2i.config import OptimConfig

    config = OptimConfig()
    return torch.optim.AdamW(
        parameters,
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )


class Trainer:
    """Takes optimizer steps in one process: forward, backward, AdamW."""

    def __init__(self, backbone: Backbone, training: Training, place: Place) -> None:
        self.backbone, self.training, self.place = backbone, training, place
        self.network = build(backbone, place)
        self.network.gradient_checkpointing = training.is_recomputed
        self._parameters = list(self.network.parameters())
        self._masters = self._parameters
        if training.precision == "bf16":
            self._masters = [weight.detach().clone() for weight in self._parameters]
            self.network.bfloat16()
        if training.is_compiled:
            compile_network(self.network, backbone, place)
        self._objective = objective_of(backbone, self.network)
        self._optimizer = build_adamw(self._masters)

    def step(self, batch: Any) -> Any:
        """Take one step; return the loss, without waiting for it."""
        with self._rounded():
            loss = self._objective(self.network, batch).mean()
        loss.backward()
        self._update()
        return loss.detach()

    def _rounded(self) -> AbstractContextManager[Any]:
        import torch

        is_rounded = self.training.precision == "autocast"
        return torch.autocast(self.place.device, torch.bfloat16) if is_rounded else nullcontext()

    def _update(self) -> None:
        import torch

        if self._masters is not self._parameters:
            for weight, master in zip(self._parameters, self._masters, strict=True):
                master.grad = weight.grad.float()
                weight.grad = None
        self._optimizer.step()
        self._optimizer.zero_grad()
        if self._masters is not self._parameters:
            with torch.no_grad():
                torch._foreach_copy_(self._parameters, self._masters)


def compile_network(network: Any, backbone: Backbone, place: Place) -> None:
    """Compile block by block as training does; at toy size trace only one block, which is fast."""
    from d2i.train.network import compile_blocks

    if place.is_toy:
        network.mid_block.compile(backend="aot_eager", fullgraph=True, dynamic=False)
    else:
        compile_blocks(backbone.family.blocks(network))


@cache
def flop_of_image(backbone: Backbone, place: Place, *, is_training: bool) -> int:
    """Count the FLOPs of one image on torch's meta device: forward, or forward and backward."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    network = build(backbone, Place("meta", place.size)).requires_grad_(is_training)
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        found = network(*backbone.family.example_inputs(network))
        parts = [found] if isinstance(found, torch.Tensor) else found
        if is_training:
            torch.stack([part.sum() for part in parts]).sum().backward()
    return int(counter.get_total_flops())


def measure_training(
    backbone: Backbone, training: Training, place: Place, budget: Budget, emit: Emit
) -> None:
    """Take steps at growing batch sizes, until memory or time runs out."""
    import torch

    place.clear()
    trainer = Trainer(backbone, training, place)
    next_s = 0.0
    for size in batch_sizes(training, place):
        label = f"batch {size}"
        if next_s > budget.left_s:
            emit(missed(label, "not reached", "its time was over"))
            return
        if training.is_compiled:
            # Else the earlier shapes would count towards the recompile limit of a block.
            torch._dynamo.reset()
        try:
            row = measure_batch(trainer, size, budget)
        except torch.OutOfMemoryError:
            emit(missed(label, "failed", "out of memory"))
            return
        emit(row)
        # Twice the images; every shape is compiled separately.
        next_s = (LEAST_REPEATS + 2) * 2 * row["ms"]["median"] / 1000
        next_s += row["first_s"] if training.is_compiled else 0
        place.clear()


def measure_batch(trainer: Trainer, size: int, budget: Budget) -> Row:
    """Take steps on one batch for a seventh of the remaining time: larger batches follow."""
    backbone, place = trainer.backbone, trainer.place
    batch = draw_batch(trainer.network, backbone, size, place.device)
    timing = timed(partial(trainer.step, batch), place, budget, share=1 / 7)
    check_finite(trainer.step(batch))
    is_traced = trainer.training.is_compiled and place.is_toy
    return measured(
        f"batch {size}{', traced only' if is_traced else ''}",
        timing,
        count=size,
        unit="pictures",
        flop=size * flop_of_image(backbone, place, is_training=True),
        ceiling="fp32" if trainer.training.precision == "fp32" else "bf16",
        peak_gib=place.peak_gib(),
    )


def batch_sizes(training: Training, place: Place) -> Iterator[int]:
    """Yield batch sizes, each twice the one before."""
    if place.is_toy:
        yield from (1,) if training.is_compiled else (1, 2)
        return
    for doubled in count():
        yield training.first_batch << doubled


def check_finite(loss: Any) -> None:
    """Raise if the timed training has diverged."""
    if not math.isfinite(float(loss)):
        raise ArithmeticError(f"the loss is {float(loss)}, expected a finite number")


def measure_engine(backbone: Backbone, place: Place, budget: Budget, emit: Emit) -> None:
    """Take steps through DeepSpeed's engine, as one rank of `d2i train` does, in bf16."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1")
    os.environ.setdefault("MASTER_PORT", str(port))
    from d2i.config import TrainConfig
    from d2i.train.distributed.engine import build_engine, join_ranks

    join_ranks()
    size = 2 if place.is_toy else backbone.engine_batch
    config = TrainConfig(num_steps=1, global_batch_size=size, micro_batch_size=size)
    place.clear()
    network = build(backbone, place)
    batch = draw_batch(network, backbone, size, place.device)
    objective = objective_of(backbone, network)
    engine = build_engine(network, config, 1)

    def step() -> Any:
        loss = objective(engine, batch).mean()
        engine.backward(loss)
        engine.step()
        return loss.detach()

    timing = timed(step, place, budget)
    check_finite(step())
    flop = size * flop_of_image(backbone, place, is_training=True)
    figures = {"count": size, "unit": "pictures", "flop": flop, "ceiling": "bf16"}
    emit(measured(f"batch {size}", timing, **figures, peak_gib=place.peak_gib()))


def measure_optimizer(backbone: Backbone, place: Place, budget: Budget, emit: Emit) -> None:
    """Step AdamW alone: weight, gradient and both moments read, all but the gradient written."""
    import torch

    place.clear()
    parameters = list(build(backbone, place).parameters())
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer = build_adamw(parameters)
    num = sum(parameter.numel() for parameter in parameters)
    timing = timed(optimizer.step, place, budget)
    label = f"AdamW, {num:,} parameters"
    emit(measured(label, timing, num_bytes=7 * 4 * num, ceiling="memory"))


# --- Sampling, encoders, reading ------------------------------------------------------------------


def measure_sampling(backbone: Backbone, place: Place, budget: Budget, emit: Emit) -> None:
    """Generate latents as `d2i eval` does, with keyed noise; decoding is a row of the encoders."""
    import numpy as np
    import torch

    from d2i.config import BackboneConfig, SampleConfig
    from d2i.eval.sampler import Sampler

    size, num_steps = (2, 4) if place.is_toy else (backbone.sample_batch, 50)
    flop = 2 * num_steps * size * flop_of_image(backbone, place, is_training=False)
    random = np.random.default_rng(0)
    for number, precision in enumerate(backbone.sample_precisions):
        place.clear()
        config = SampleConfig(
            num_steps=num_steps,
            guidance_scale=backbone.guidance_scale,
            compute_batch_size=size,
            precision=precision,
        )
        network = BackboneConfig(name=backbone.name, **place.sizes(backbone))
        shape = text_shape(backbone, place)
        # Nothing is decoded, so no autoencoder is needed.
        vae: Any = None
        with torch.device(place.device):
            sampler = Sampler(network, vae, config, np.zeros(shape, np.float32), place.device)
        text = random.standard_normal((size, *shape), dtype=np.float32)
        keys = [f"test-{row}" for row in range(size)]
        share = 0.9 / (len(backbone.sample_precisions) - number)
        timing = timed(partial(sampler.sample_latents, keys, text), place, budget, share)
        emit(
            measured(
                f"{precision}, batch {size}, {num_steps} steps",
                timing,
                count=size,
                unit="pictures",
                flop=flop,
                ceiling=precision,
                peak_gib=place.peak_gib(),
            )
        )


def text_shape(backbone: Backbone, place: Place) -> tuple[int, int]:
    """Return the numbers of tokens and features of a text that the network reads."""
    network = build(backbone, Place("meta", place.size))
    return network.num_text_tokens, network.text_dim


# The published sizes (docs/models.md, Networks), and small ones that have the same parts.
_CLIP_TEXT = {
    "full": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "projection_dim": 768,
    },
    "toy": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "projection_dim": 32,
    },
}
_CLIP_IMAGE = {
    "full": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "projection_dim": 512,
        "image_size": 224,
        "patch_size": 32,
    },
    "toy": _CLIP_TEXT["toy"] | {"image_size": 32, "patch_size": 16},
}
_VAE_CHANNELS = {"full": (128, 256, 512, 512), "toy": (32, 32)}


def save_encoders(directory: Path, size: str) -> dict[str, str]:
    """Write CLIP's two towers and the KL autoencoder with random weights, in d2i's formats."""
    from diffusers import AutoencoderKL
    from transformers import (
        CLIPTextConfig,
        CLIPTextModelWithProjection,
        CLIPVisionConfig,
        CLIPVisionModelWithProjection,
    )

    channels = _VAE_CHANNELS[size]
    encoders = {
        "clip_text": CLIPTextModelWithProjection(CLIPTextConfig(**_CLIP_TEXT[size])),
        "clip_image": CLIPVisionModelWithProjection(CLIPVisionConfig(**_CLIP_IMAGE[size])),
        "vae": AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * len(channels),
            up_block_types=("UpDecoderBlock2D",) * len(channels),
            block_out_channels=channels,
            layers_per_block=2,
        ),
    }
    for name, encoder in encoders.items():
        encoder.save_pretrained(directory / name)
    return {name: str(directory / name) for name in encoders}


def encoder_calls(encoders: Any, place: Place) -> list[tuple[str, str, Callable[[int, int], Any]]]:
    """Return each encoder's row: label, unit, and the call from (rows, batch)."""
    import numpy as np
    import torch

    random = np.random.default_rng(0)
    side = encoders.clip_image.image_size
    resolutions = (32,) if place.is_toy else (256, 512)
    tokens = random.integers(0, 49408, (64, 77), dtype=np.uint16)

    def pixels(edge: int) -> Any:
        return random.integers(0, 256, (64, edge, edge, 3), dtype=np.uint8)

    small = pixels(side)
    calls: list[tuple[str, str, Callable[[int, int], Any]]] = [
        ("CLIP text", "texts", lambda num, size: encoders.clip_text.encode(tokens[:num], size)),
        (
            f"CLIP image, {side} px",
            "pictures",
            lambda num, size: encoders.clip_image.encode(small[:num], size),
        ),
    ]
    factor = 2 ** (len(_VAE_CHANNELS[place.size]) - 1)
    for edge in resolutions:
        images = pixels(edge)
        latents = torch.randn(64, 4, edge // factor, edge // factor)

        def encode(num: int, size: int, images: Any = images) -> Any:
            return encoders.vae.encode(images[:num], size)

        def decode(num: int, size: int, latents: Any = latents) -> Any:
            return encoders.vae.decode(latents[:num], size)

        calls += [
            (f"autoencoder, encode {edge} px", "pictures", encode),
            (f"autoencoder, decode {edge} px", "pictures", decode),
        ]
    return calls


def measure_encoders(place: Place, budget: Budget, emit: Emit) -> None:
    """Encode and decode with d2i's own encoders, from and to arrays in memory."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from d2i.config import EncodersConfig, Precision
    from d2i.encoders import load_encoders

    size = 2 if place.is_toy else 32
    precisions: tuple[Precision, ...] = ("fp32", "bf16")
    with tempfile.TemporaryDirectory() as directory:
        config = EncodersConfig(**save_encoders(Path(directory), place.size))
        for number, precision in enumerate(precisions):
            place.clear()
            calls = encoder_calls(load_encoders(config, place.device, precision), place)
            for place_in_line, (label, unit, call) in enumerate(calls):
                decodes = "decode" in label
                if decodes and number:
                    # It decodes in float32 in either case.
                    continue
                left = len(calls) * (len(precisions) - number) - place_in_line
                row = f"{label}, {precision}, batch {size}"
                try:
                    with FlopCounterMode(display=False) as counter:
                        call(1, 1)
                    timing = timed(partial(call, size, size), place, budget, share=0.8 / left)
                except torch.OutOfMemoryError:
                    emit(missed(row, "failed", "out of memory"))
                    place.clear()
                    continue
                flop = size * counter.get_total_flops()
                emit(measured(row, timing, count=size, unit=unit, flop=flop, ceiling=precision))


def write_samples(directory: Path, backbone: Backbone, place: Place, num: int) -> Any:
    """Write shards of random numbers in the network's shapes; return a reader."""
    import numpy as np

    from d2i.shards import Sample, ShardReader, json_bytes, npy_bytes, write_manifest, write_shard

    network = build(backbone, Place("meta", place.size))
    text = (network.num_text_tokens, network.text_dim)
    shapes = {
        "moments": (8, network.latent_size, network.latent_size),
        "clip": (getattr(network, "clip_dim", 512),),
        "tokens": text[:1],
        "text": text,
    }
    random = np.random.default_rng(0)

    def sample(number: int) -> Any:
        members = {"json": json_bytes({"number": number})}
        for name, shape in shapes.items():
            values = random.standard_normal(shape, dtype=np.float32).astype(np.float16)
            is_text = name == "tokens"
            members[f"{name}.npy"] = npy_bytes(np.zeros(shape, np.uint16) if is_text else values)
        return Sample(f"train-{number}-0-0", members)

    for shard in range(2):
        numbers = range(shard * num // 2, (shard + 1) * num // 2)
        write_shard(map(sample, numbers), str(directory), shard, failures={})
    (directory / "empty_tokens.npy").write_bytes(npy_bytes(np.zeros(text[:1], np.uint16)))
    (directory / "empty_text.npy").write_bytes(npy_bytes(np.zeros(text, np.float16)))
    write_manifest(str(directory), {})
    return ShardReader(str(directory))


def measure_reading(backbone: Backbone, place: Place, budget: Budget, emit: Emit) -> None:
    """Read batches as training does, with random draws: shards, pinned memory, device."""
    num, size = (16, 4) if place.is_toy else (2000, backbone.reader_batch)
    with tempfile.TemporaryDirectory() as directory:
        reader = write_samples(Path(directory), backbone, place, num)
        threads = (2,) if place.is_toy else (2, 8)
        for number, num_threads in enumerate(threads):
            share = 0.8 / (len(threads) - number)
            _measure_threads(reader, backbone, place, budget, share, num_threads, size, emit)


def _measure_threads(
    reader: Any,
    backbone: Backbone,
    place: Place,
    budget: Budget,
    share: float,
    num_threads: int,
    size: int,
    emit: Emit,
) -> None:
    import numpy as np
    import torch

    from d2i.config import TrainConfig
    from d2i.train.data.batch import BatchLoader
    from d2i.train.data.text_source import StoredText

    config = TrainConfig(
        num_steps=1,
        global_batch_size=size,
        micro_batch_size=size,
        num_reader_threads=num_threads,
    )
    random = np.random.default_rng(0)
    num_samples = len(reader.keys)
    requests = ((random.choice(num_samples, size, replace=False), step) for step in range(10**6))
    batches = BatchLoader(reader, config, backbone.family, StoredText)
    ahead = batches.read_ahead(requests)
    num_bytes = size_bytes(next(ahead))
    device = torch.device(place.device)

    def move_all() -> None:
        # More than are prefetched, so that batches already in the queue are a small part.
        for _ in range(4 * num_threads):
            next(ahead).to(device)

    timing = timed(move_all, place, budget, share)
    batches.close()
    moved = 4 * num_threads
    emit(
        measured(
            f"batch {size}, {num_threads} threads",
            timing,
            count=moved * size,
            unit="samples",
            num_bytes=moved * num_bytes,
            ceiling="link",
        )
    )


def size_bytes(batch: Any) -> int:
    """Return the bytes of a batch's tensors."""
    values = [*vars(batch).values(), *batch.conditions.values()]
    tensors = [value for value in values if hasattr(value, "numel")]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


# --- The list, and the program --------------------------------------------------------------------


@dataclass(frozen=True)
class Measurement:
    """A named measurement, its share of the time, and the function that yields its rows."""

    name: str
    weight: float
    run: Callable[[Place, Budget, Emit], None]


def list_measurements() -> list[Measurement]:
    """Return all measurements: the peak rates first, then by importance."""
    found = [
        Measurement("device: matrix rate", 2, measure_matrix_rate),
        Measurement("device: memory bandwidth", 0.5, measure_bandwidth),
        Measurement("device: link", 0.5, measure_link),
    ]
    most = max(len(backbone.trainings) for backbone in BACKBONES)
    for number in range(most):
        for backbone in BACKBONES:
            for training in backbone.trainings[number : number + 1]:
                name = f"{backbone.name}: training, {training.title}"
                run = partial(measure_training, backbone, training)
                found.append(Measurement(name, training.weight, run))
    for kind, weight, measure in (
        ("sampling", 4, measure_sampling),
        ("optimizer", 0.5, measure_optimizer),
        ("reading", 1.5, measure_reading),
    ):
        found += [
            Measurement(f"{backbone.name}: {kind}", weight, partial(measure, backbone))
            for backbone in BACKBONES
        ]
    found.append(Measurement("encoders", 5, measure_encoders))
    # Last, because it sets up process-wide state.
    for backbone in BACKBONES:
        name = f"{backbone.name}: training, bf16 by DeepSpeed"
        found.append(Measurement(name, 2, partial(measure_engine, backbone)))
    return found


def describe_machine(place: Place) -> dict[str, Any]:
    """Describe the machine."""
    import torch

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    found: dict[str, Any] = {
        "processor": names[0] if names else platform.machine(),
        "num_cpus": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB, 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    for package in ("deepspeed", "diffusers", "transformers", "pyarrow"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    if place.is_cuda:
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "device": properties.name,
            "device_memory_gib": round(properties.total_memory / GIB, 1),
            "cuda": torch.version.cuda,
            "driver": driver_version(),
        }
    else:
        found["device"] = "cpu"
    return found


def driver_version() -> str | None:
    """Return the version of the driver; None if it cannot be queried."""
    query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.splitlines()[0].strip()


def run_measurement(measurement: Measurement, place: Place, seconds: float, emit: Emit) -> bool:
    """Run one measurement and print its result; return whether the process can continue."""
    import torch

    state, reason, is_usable = "measured", None, True
    try:
        measurement.run(place, Budget(seconds), emit)
    except ModuleNotFoundError as err:
        state, reason = "unmeasured", f"not installed: {err.name}"
    except OutOfTimeError as err:
        state, reason = "not reached", str(err)
    except torch.OutOfMemoryError:
        state, reason = "failed", "out of memory"
    except Exception as err:
        state, reason, is_usable = "failed", _one_line(err), False
    emit({"end": measurement.name, "state": state, "reason": reason})
    return is_usable


def _one_line(err: Exception) -> str:
    lines = str(err).strip().splitlines()
    return f"{type(err).__name__}: {lines[0][:200] if lines else ''}"


def build_parser() -> argparse.ArgumentParser:
    """Return the argument parser."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="measurements; default: all")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--size", choices=("full", "toy"), default="full")
    parser.add_argument(
        "--seconds", type=float, default=480, help="time limit for all measurements"
    )
    return parser


def main() -> None:
    """Run the measurements, and print a line of JSON for each event."""
    parser = build_parser()
    options = parser.parse_args()
    known = {measurement.name: measurement for measurement in list_measurements()}
    if strange := [name for name in options.names if name not in known]:
        parser.error(f"no measurement {strange[0]!r}; expected one of {', '.join(known)}")
    budget = Budget(options.seconds)
    lines = os.fdopen(os.dup(1), "w")
    # Output of libraries goes to stderr, not among the results.
    os.dup2(2, 1)

    def emit(row: Row) -> None:
        print(json.dumps(row), file=lines, flush=True)

    from d2i.io.child_process import die_with_parent

    die_with_parent()
    import torch

    place = Place(options.device, options.size)
    if place.is_cuda and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; --device cpu --size toy runs on a CPU")
    if not place.is_cuda:
        torch.set_num_threads(1)
    emit({"machine": describe_machine(place)})
    waiting = [known[name] for name in options.names or known]
    while waiting and budget.left_s > 0:
        measurement = waiting.pop(0)
        weights = measurement.weight + sum(later.weight for later in waiting)
        seconds = budget.left_s * measurement.weight / weights
        emit({"begin": measurement.name, "seconds": _short(seconds)})
        if not run_measurement(measurement, place, seconds, emit):
            raise SystemExit(FAILED)
        place.clear()


if __name__ == "__main__":
    main()
