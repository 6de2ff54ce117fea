"""Preflight before a long training: memory, reckoned first and measured; numbers; speed."""

from __future__ import annotations

import dataclasses
import json
import platform
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from d2i.config import TrainConfig
from d2i.diffusion.draws import normal
from d2i.io import checksums, storage
from d2i.models import build_backbone
from d2i.models.registry import family_of_backbone
from d2i.recipes import check_prepared_with
from d2i.shards import ShardReader, data_set_url
from d2i.train.checkpoint.checkpoint_writer import build_state
from d2i.train.data.base_parts import check_base_parts
from d2i.train.data.batch import Batch, BatchLoader
from d2i.train.data.loader import (
    build_order,
    check_arrays,
    check_cache,
    check_sizes,
)
from d2i.train.data.text_source import build_text
from d2i.train.distributed.engine import build_engine, join_ranks
from d2i.train.distributed.ranks import Ranks
from d2i.train.failures import reported_errors
from d2i.train.memory import MemoryReckoner, device_memory, memory_problem
from d2i.train.monitor.metrics_logger import say
from d2i.train.monitor.throughput import count_flops, peak_flops
from d2i.train.network import build_trained_network
from d2i.train.objective import build_objective
from d2i.train.request import TrainRequest

PREFLIGHT_NAME = "preflight.json"
_TINY = {
    "latent_size": 8,
    "patch_size": 2,
    "dim": 64,
    "depth": 4,
    "num_heads": 4,
    "text_dim": 16,
    "num_text_tokens": 7,
}
# Ten times the published networks' distance from float64 (README of the golden numbers).
_MAX_DISTANCE = 4e-5
_NUM_REDUCED = 4_000_000
_NUM_TIMED_STEPS = 3
_NUM_INPUT_BATCHES = 8
# A CPU does not report that memory is full, so no larger batch is tried.
_CPU_MICRO_BATCH_SIZE = 4


def preflight(request: TrainRequest) -> None:
    """Measure on all ranks, and write `preflight.json` into the run directory.

    The run itself is not started, and no trained weights are kept.

    Raises:
        ConfigError: If the ranks cannot share the batch, or the sizes do not fit the data.
    """
    ranks = join_ranks()
    with reported_errors(request, ranks):
        found = _measure(request, ranks)
        if ranks.is_rank_zero:
            data = json.dumps(found, indent=1, sort_keys=True) + "\n"
            checksums.write_bytes(storage.join(request.run_url, PREFLIGHT_NAME), data.encode())
        ranks.barrier()
    torch.distributed.destroy_process_group()


def _measure(request: TrainRequest, ranks: Ranks) -> dict[str, Any]:
    recipe, config = request.recipe, request.recipe.train
    micro_batch_size, num_micro_batches = config.accumulation(ranks.world_size)
    reader = request.open_shards(data_set_url(request.data_url, "train"))
    check_cache(reader, request.open_validation(), config, request.cache_gb)
    check_prepared_with(recipe, reader.url)
    check_arrays(recipe, reader)
    reckoned = ranks.build_on_rank_zero(lambda: _reckon_memory(request, ranks, reader))
    ranks.build_on_rank_zero(lambda: check_base_parts(recipe, reader))
    network = build_trained_network(recipe)
    open_text = build_text(recipe, reader, str(ranks.device))
    check_sizes(network, reader, open_text(reader))
    found: dict[str, Any] = {
        "recipe": recipe.name,
        "device": _device_name(ranks.device),
        "world_size": ranks.world_size,
        "precision": config.precision,
        "micro_batch_size": micro_batch_size,
        "num_micro_batches": num_micro_batches,
        "torch_version": torch.__version__,
        "reckoned_memory": reckoned,
        "device_distance": device_distance(ranks.device),
        "max_device_distance": _MAX_DISTANCE,
        "all_reduce_gb_per_s": _time_all_reduce(ranks),
    }
    family = family_of_backbone(recipe.backbone.name)
    batches = BatchLoader(reader, config, family, open_text)
    found["input_samples_per_s"] = _time_input(batches, reader, config, ranks)
    found |= _Trial(request, ranks, network, batches, len(reader)).run()
    batches.close()
    return found


def _reckon_memory(
    request: TrainRequest, ranks: Ranks, reader: ShardReader
) -> dict[str, Any] | None:
    """Print what the training will take of a device, before any of it is there.

    Returns:
        The bytes of every part, their `total`, those `available`, and the `settings` that make it
        fit: an empty list if it fits, None if nothing does. None if it cannot be reckoned.
    """
    recipe, device = request.recipe, ranks.device
    has_latents = "text" in reader.manifest.arrays
    reckoner = MemoryReckoner(ranks.world_size, device.type, request.zero, has_latents=has_latents)
    try:
        memory = reckoner.reckon(recipe)
        available = device_memory(device, ranks.world_size)
        fits = memory.total <= available
        settings = () if fits else reckoner.settings_that_fit(recipe, available)
    except RuntimeError as err:
        say(f"warning: memory is not reckoned, only measured: {str(err).splitlines()[0][:200]}")
        return None
    say(memory_problem(memory, available, settings) or f"memory: {memory.describe()}")
    sizes = dataclasses.asdict(memory) | {"total": memory.total, "available": available}
    return sizes | {"settings": None if settings is None else list(settings)}


def device_distance(device: torch.device) -> float:
    """Return a tiny U-ViT's largest error in float32 on a device, against float64 on the CPU."""
    torch.manual_seed(0)
    network: Any = build_backbone("uvit-s", **_TINY).requires_grad_(False)
    latent, text = (_random(name, shape) for name, shape in (("x", (4, 8, 8)), ("t", (7, 16))))
    n = torch.tensor([250.0, 750.0])
    exact = network.double()(latent.double(), n.double(), text.double())
    inputs = [tensor.to(device) for tensor in (latent, n, text)]
    there = network.float().to(device)(*inputs)
    return float((there.cpu().double() - exact).abs().max())


def _random(name: str, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(normal(0, f"preflight.{name}", ("a", "b"), 0, shape))


def _time_all_reduce(ranks: Ranks) -> float | None:
    """Measure the GB/s (1e9 bytes) that each rank sends, by the ring formula; None for one rank."""
    if ranks.world_size == 1:
        return None
    numbers = torch.ones(_NUM_REDUCED, device=ranks.device)
    torch.distributed.all_reduce(numbers)
    with _timed(ranks.device) as seconds:
        torch.distributed.all_reduce(numbers)
    share = 2 * (ranks.world_size - 1) / ranks.world_size
    return round(share * 4 * _NUM_REDUCED / seconds[0] / 1e9, 3)


def _time_input(
    batches: BatchLoader, reader: ShardReader, config: TrainConfig, ranks: Ranks
) -> float:
    """Measure the samples/s read, including their random draws, summed over all ranks."""
    order = build_order(reader, config)
    size = config.accumulation(ranks.world_size)[0]
    requests = ((order.global_batch(step, size), step) for step in range(_NUM_INPUT_BATCHES))
    with _timed(ranks.device) as seconds:
        num_read = sum(len(batch.keys) for batch in batches.read_ahead(requests))
    return round(float(ranks.sum(torch.tensor(num_read / seconds[0]))), 1)


class _Trial:
    """Trial steps, later discarded, that measure the largest micro batch, memory and speed."""

    def __init__(
        self,
        request: TrainRequest,
        ranks: Ranks,
        network: Any,
        batches: BatchLoader,
        num_samples: int,
    ) -> None:
        self._config, self._ranks = request.recipe.train, ranks
        self._backbone = request.recipe.backbone
        self._batches, self._num_samples = batches, num_samples
        # Here every micro batch is a full step, so that the optimizer's memory is included.
        one_each = {"global_batch_size": ranks.world_size, "micro_batch_size": 1}
        trial_config = self._config.model_copy(update=one_each)
        self._engine = build_engine(network, trial_config, ranks.world_size, request.zero)
        self._state = build_state(self._engine, trial_config)
        family = family_of_backbone(self._backbone.name)
        vae = family.vae_numbers(self._engine.module)
        self._objective = build_objective(family, vae, self._config)

    def run(self) -> dict[str, Any]:
        """Run the trial steps and return their entries of `preflight.json`."""
        size, largest = self._largest_micro_batch()
        step_s = self._time_steps(size)
        images_per_s = size * self._ranks.world_size / step_s
        config = self._config
        peak = peak_flops(self._ranks.device, config.precision)
        flops = count_flops(self._backbone)
        mfu = peak and images_per_s * flops / (self._ranks.world_size * peak)
        return {
            "measured_micro_batch_size": size,
            "largest_micro_batch_size": largest,
            "peak_memory_gb": round(_peak_memory(self._ranks.device) / 1e9, 3),
            "images_per_s": round(images_per_s, 3),
            "mfu": mfu and round(mfu, 4),
            "hours_to_finish": round(
                config.num_steps * config.global_batch_size / images_per_s / 3600, 3
            ),
        }

    def _largest_micro_batch(self) -> tuple[int, int | None]:
        """Return the micro batch size to measure with, and the largest that fits (None on CPUs)."""
        wanted, _ = self._config.accumulation(self._ranks.world_size)
        if self._ranks.device.type != "cuda":
            return min(wanted, _CPU_MICRO_BATCH_SIZE), None
        largest, size = 0, 1
        while size <= self._config.global_batch_size and self._fits(size):
            largest, size = size, 2 * size
        if largest < wanted and self._fits(wanted):
            largest = wanted
        return max(1, min(largest, wanted)), largest

    def _fits(self, size: int) -> bool:
        has_failed = torch.tensor(0)
        try:
            self._step(self._batch(size))
        except torch.OutOfMemoryError:
            has_failed += 1
            torch.cuda.empty_cache()
        return int(self._ranks.sum(has_failed)) == 0

    def _time_steps(self, size: int) -> float:
        batch = self._batch(size)
        self._step(batch)
        with _timed(self._ranks.device) as seconds:
            for _ in range(_NUM_TIMED_STEPS):
                self._step(batch)
        return seconds[0] / _NUM_TIMED_STEPS

    def _step(self, batch: Batch) -> None:
        self._engine.backward(self._objective(self._engine, batch).mean())
        self._engine.step()
        self._state.update_averages()

    def _batch(self, size: int) -> Batch:
        indices = np.arange(size) % self._num_samples
        return self._batches.read(indices, 0).to(self._ranks.device)


@contextmanager
def _timed(device: torch.device) -> Iterator[list[float]]:
    """Yield a list that receives the seconds of the block, once the device has finished."""
    seconds: list[float] = []
    _wait_for(device)
    started = time.perf_counter()
    yield seconds
    _wait_for(device)
    seconds.append(time.perf_counter() - started)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} processor"
