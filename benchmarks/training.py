"""Overhead of a training step beyond the network itself, and input speed of a rank.

    python benchmarks/training.py step --batch 2 --steps 6
    python benchmarks/training.py input --num-samples 2000
    python benchmarks/training.py unidiffuser --depth 6

`step`: U-ViT-S on one rank, in a bare PyTorch loop and then in d2i's training loop (reading, random
draws, DeepSpeed, EMA, metrics) in one process; the time of an EMA update; and how long a checkpoint
blocks training. CPU seconds, which other load disturbs less; wall-clock seconds for the checkpoint.
`input`: micro batches of 256 px samples for a network that takes no time. `unidiffuser`: a forward
and backward pass of UniDiffuser-v1 (30 blocks, or `--depth`), with `--optimizer` the whole step
with AdamW and EMA; the peak memory of the process.

Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from d2i.config import Recipe, TrainConfig, apply_settings
from d2i.diffusion import noise_prediction_loss
from d2i.models import build_backbone, family
from d2i.recipes import load_recipe
from d2i.shards import Sample, ShardReader, json_bytes, npy_bytes, write_manifest, write_shard
from d2i.train.checkpoint.checkpoint_files import Progress
from d2i.train.checkpoint.checkpoint_writer import CheckpointWriter, TrainState, build_state
from d2i.train.checkpoint.ema import Ema
from d2i.train.data.batch import BatchLoader
from d2i.train.data.data_order import DataOrder
from d2i.train.data.text_source import StoredText
from d2i.train.distributed.engine import build_engine, join_ranks
from d2i.train.network import autocast_to
from d2i.train.rank_main import run_loop
from d2i.train.request import TrainRequest

SHAPES = {"moments": (8, 32, 32), "clip": (512,), "tokens": (77,), "text": (77, 768)}
NUM_SHARD_SAMPLES = 500


class Clock:
    """Takes the place of a fault: records the CPU time after each step."""

    def __init__(self) -> None:
        self.marks = [time.process_time()]

    def trigger_at(self, _point: str) -> None:
        """Record the end of a step."""
        self.marks.append(time.process_time())

    def seconds(self) -> list[float]:
        """Return the seconds of each step except the first, which is a warm-up."""
        return [end - start for start, end in zip(self.marks, self.marks[1:], strict=False)][1:]


def write_data(directory: Path, num_samples: int) -> ShardReader:
    """Write samples of random numbers at U-ViT-S's sizes."""
    random = np.random.default_rng(0)
    for shard, start in enumerate(range(0, num_samples, NUM_SHARD_SAMPLES)):
        samples = []
        for number in range(start, min(start + NUM_SHARD_SAMPLES, num_samples)):
            encoded = {"json": json_bytes({"number": number})}
            for name, shape in SHAPES.items():
                values = random.standard_normal(shape).astype(np.float16)
                numbers = np.zeros(shape, np.uint16) if name == "tokens" else values
                encoded[f"{name}.npy"] = npy_bytes(numbers)
            samples.append(Sample(f"train-{number}-0-0", encoded))
        write_shard(samples, str(directory), shard, failures={})
    (directory / "empty_tokens.npy").write_bytes(npy_bytes(np.zeros(77, np.uint16)))
    (directory / "empty_text.npy").write_bytes(npy_bytes(np.zeros((77, 768), np.float16)))
    write_manifest(str(directory), {})
    return ShardReader(str(directory))


def recipe(batch: int, num_steps: int, precision: str) -> Recipe:
    """Return the recipe of U-ViT-S at a batch size for a CPU."""
    settings = {
        "global_batch_size": batch,
        "micro_batch_size": batch,
        "num_steps": num_steps,
        "num_checkpoint_steps": 10**9,
        "precision": precision,
    }
    named = [f"train.{name}={json.dumps(value)}" for name, value in settings.items()]
    return apply_settings(load_recipe("uvit-s-photochat"), named)


def measure_step(args: argparse.Namespace) -> dict[str, Any]:
    """Time d2i's loop and a bare one on the same network and batch."""
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29871")
    ranks = join_ranks()
    settings = recipe(args.batch, args.steps + 1, args.precision)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        (directory / "train").mkdir()
        reader = write_data(directory / "train", 64)
        network = build_backbone("uvit-s")
        autocast_to(network, settings.train.precision)
        bare = time_bare_loop(reader, settings.train, args.steps + 1)
        engine = build_engine(network, settings.train, 1)
        state = build_state(engine, settings.train)
        clock: Any = Clock()
        request = TrainRequest(settings, name, str(directory / "run"))
        (directory / "run").mkdir()
        shapes = {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}
        with CheckpointWriter(str(directory / "run"), settings.train, ranks, shapes) as writer:
            run_loop(request, ranks, state, reader, StoredText, writer, Progress(), clock)
            writer.finish()
            ours = clock.seconds()
            stall_s = time_checkpoint(writer, state)
        ema_s = statistics.median(time_of(state.update_averages) for _ in range(5))
    step_s, bare_s = statistics.median(ours), statistics.median(bare)
    return {
        "batch": args.batch,
        "precision": args.precision,
        "step_s": round(step_s, 3),
        "bare_step_s": round(bare_s, 3),
        "overhead": round(step_s / bare_s - 1, 4),
        "ema_s": round(ema_s, 4),
        "ema_share": round(ema_s / step_s, 4),
        "checkpoint_stall_s": round(stall_s, 3),
        "step_s_repeats": [round(value, 3) for value in ours],
        "bare_step_s_repeats": [round(value, 3) for value in bare],
    }


def time_bare_loop(reader: ShardReader, config: TrainConfig, num_steps: int) -> list[float]:
    """Time forward, backward and AdamW on one batch in memory."""
    batches = BatchLoader(reader, config, family("uvit"), StoredText)
    batch = batches.read(np.arange(config.global_batch_size), 0).to(torch.device("cpu"))
    batches.close()
    network = build_backbone("uvit-s")
    masters = list(network.parameters())
    autocast_to(network, config.precision)
    if config.precision == "bf16_weights":
        masters = [weight.detach().clone() for weight in masters]
        network.bfloat16()
    optimizer = torch.optim.AdamW(masters, lr=3e-5, fused=True)
    clock = Clock()
    for _ in range(num_steps):
        latent = batch.image[:, :4]
        noise_prediction_loss(
            network, latent, batch.conditions["text"], batch.draw + 1, batch.noise
        ).mean().backward()
        step_masters(network, masters, optimizer)
        clock.trigger_at("")
    return clock.seconds()


@torch.no_grad()
def step_masters(network: Any, masters: list[Any], optimizer: torch.optim.Optimizer) -> None:
    """Step the float32 master weights, of which the network's own may be copies."""
    pairs = list(zip(network.parameters(), masters, strict=True))
    for weight, master in pairs:
        master.grad = weight.grad.float()
        weight.grad = None
    optimizer.step()
    for weight, master in pairs:
        if weight is not master:
            weight.copy_(master)


def time_checkpoint(writer: CheckpointWriter, state: TrainState) -> float:
    """Return the wall-clock seconds for which a checkpoint blocks training."""
    started = time.perf_counter()
    writer.start(state, Progress(step=10**6))
    stall_s = time.perf_counter() - started
    writer.finish()
    return stall_s


def time_of(function: Any) -> float:
    """Return the CPU seconds of a call."""
    started = time.process_time()
    function()
    return time.process_time() - started


def measure_input(args: argparse.Namespace) -> dict[str, Any]:
    """Time reading, random draws and tensors, for a network that takes no time."""
    config = TrainConfig(
        num_steps=1,
        global_batch_size=args.batch,
        micro_batch_size=args.batch,
        num_reader_threads=args.threads,
    )
    with tempfile.TemporaryDirectory() as name:
        reader = write_data(Path(name), args.num_samples)
        sizes = tuple(shard.num_samples for shard in reader.manifest.shards)
        order = DataOrder(sizes, 0)
        batches = BatchLoader(reader, config, family("uvit"), StoredText)
        rates, cpu_rates = [], []
        for repeat in range(args.repeats + 1):
            steps = range(repeat * args.steps, (repeat + 1) * args.steps)
            wall, cpu = time.perf_counter(), time.process_time()
            requests = ((order.global_batch(step, args.batch), step) for step in steps)
            num_read = sum(len(batch.keys) for batch in batches.read_ahead(requests))
            rates.append(num_read / (time.perf_counter() - wall))
            cpu_rates.append(num_read / (time.process_time() - cpu))
        batches.close()
    return {
        "batch": args.batch,
        "threads": args.threads,
        "samples_per_s": round(statistics.median(rates[1:])),
        "samples_per_cpu_s": round(statistics.median(cpu_rates[1:])),
        "samples_per_s_repeats": [round(value) for value in rates[1:]],
    }


def measure_unidiffuser(args: argparse.Namespace) -> dict[str, Any]:
    """Measure forward and backward of one 512 px image, or with `--optimizer` the whole step."""
    network: Any = build_backbone("unidiffuser-v1", depth=args.depth, gradient_checkpointing=True)
    noise = torch.Generator().manual_seed(0)
    parts = [torch.randn(1, *shape, generator=noise) for shape in ((4, 64, 64), (1, 512), (77, 64))]
    n = torch.tensor([500])
    started, cpu = time.perf_counter(), time.process_time()
    predicted = network(*parts, n, n)
    loss = sum(part.square().sum() for part in predicted) / sum(p.numel() for p in parts)
    loss.backward()
    found = {"forward_backward_s": round(time.perf_counter() - started, 1)}
    if args.optimizer:
        ema = Ema(list(network.parameters()), 0.9999)
        torch.optim.AdamW(network.parameters(), lr=3e-5, fused=True).step()
        ema.update()
    grads = [p.grad for p in network.parameters()]
    return {
        "depth": args.depth,
        "num_parameters": sum(p.numel() for p in network.parameters()),
        "with_optimizer": args.optimizer,
        "loss": round(float(loss.detach()), 4),
        "gradients_are_finite": all(g is not None and bool(g.isfinite().all()) for g in grads),
        **found,
        "cpu_s": round(time.process_time() - cpu, 1),
        "peak_memory_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),
    }


def main() -> None:
    """Run the requested measurement and print the line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=("step", "input", "unidiffuser"))
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--steps", type=int, default=6)
    precisions = ("fp32", "bf16", "bf16_weights")
    parser.add_argument("--precision", choices=precisions, default="fp32")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--num-samples", type=int, default=2000)
    parser.add_argument("--depth", type=int, default=30)
    parser.add_argument("--optimizer", action="store_true")
    args = parser.parse_args()
    measures = {"step": measure_step, "input": measure_input, "unidiffuser": measure_unidiffuser}
    result = {"benchmark": f"training {args.part}", **measures[args.part](args)}
    result["machine"] = f"{platform.machine()}, Python {platform.python_version()}"
    print(json.dumps(result))


if __name__ == "__main__":
    main()
