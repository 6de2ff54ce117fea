"""The program that every rank of `test_backbone_training.py` runs: one golden step.

    deepspeed --num_accelerators 2 tests/integration/backbone_program.py WHICH OUT

Takes the steps of `SAMPLE`, or those of `WAYS`, as `WHICH` says: `sample` or `all`. A single rank
takes those at ZeRO 0.

Writes `OUT/FAMILY-KIND-ZERO.safetensors` for `full` and `lora`: the loss before and after the step,
the norm of the gradient where one rank has it whole, and every trained weight after it.
"""

from __future__ import annotations

import itertools
import os
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from d2i.config import AdapterConfig, OptimConfig, TrainConfig
from d2i.models import family
from d2i.models.image_codec import ImageCodec
from d2i.models.lora import add_lora
from d2i.train.checkpoint.checkpoint_files import Checkpoint, Progress, step_directory
from d2i.train.checkpoint.checkpoint_writer import CheckpointWriter, build_state
from d2i.train.data.batch import Batch
from d2i.train.distributed.engine import build_engine, join_ranks, trained_parameters
from d2i.train.distributed.ranks import Ranks
from d2i.train.objective import build_objective
from tests.golden.arrays import facts, tensors
from tests.golden.backbones import (
    fill_by_name,
    golden_conditions,
    golden_draw,
    golden_network,
)

FAMILIES = ("sd15", "sdxl", "z_image", "flux2_klein", "sana")
# Family, kind and ZeRO stage of every step.
WAYS = tuple(itertools.product(FAMILIES, ("full", "lora"), range(4)))
# Both kinds at every stage, each by one family, and every family.
SAMPLE = tuple(
    (FAMILIES[number % len(FAMILIES)], kind, stage)
    for number, (kind, stage) in enumerate(itertools.product(("full", "lora"), range(4)))
)
LORA = AdapterConfig(kind="lora", rank=4, alpha=8)
CONFIG = TrainConfig(
    num_steps=1,
    global_batch_size=2,
    micro_batch_size=2,
    optim=OptimConfig(lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2),
    precision="fp32",
)


def golden_batch(name: str, ranks: Ranks) -> Batch:
    """Return this rank's part of the golden batch; the latents are the mean."""
    golden = tensors(f"backbones/{name}")
    raw, noise = golden["in.raw"], golden["in.noise"]

    def part(whole: Tensor) -> Tensor:
        return whole.chunk(ranks.world_size)[ranks.rank]

    return Batch(
        keys=(),
        image=part(stored_image(family(name).codec, raw)),
        latent_noise=part(torch.zeros_like(raw)),
        noise=part(noise),
        draw=part(golden_draw(name)),
        conditions={key: part(value) for key, value in golden_conditions(name).items()},
    )


def stored_image(codec: ImageCodec, raw: Tensor) -> Tensor:
    """Return the array that shards would hold of raw latents."""
    if codec.array == "latent":
        return raw
    return torch.cat([raw, torch.full_like(raw, -30.0)], dim=1)


def take_step(name: str, kind: str, stage: int, ranks: Ranks, out: Path) -> None:
    """Take the golden step and write what came of it."""
    network: Any = golden_network(name)
    if kind == "lora":
        add_lora(network, LORA, family(name).presets, seed=0)
        fill_by_name(network, facts(f"backbones/{name}")["seed"], part="lora_")
    shapes = {key: tuple(p.shape) for key, p in trained_parameters(network)}
    engine = build_engine(network, CONFIG, ranks.world_size, {"stage": stage})
    state = build_state(engine, CONFIG)
    vae = facts(f"backbones/{name}")["vae_numbers"]
    objective = build_objective(family(name), vae, CONFIG)
    batch = golden_batch(name, ranks)
    loss = objective(engine, batch).mean()
    found = {"loss_before": ranks.sum(loss.detach()) / ranks.world_size}
    engine.backward(loss)
    if ranks.world_size == 1:
        gradients = [p.grad for _, p in trained_parameters(network) if p.grad is not None]
        found["grad_norm"] = (
            torch.stack([g.double().square().sum() for g in gradients]).sum().sqrt()
        )
    engine.step()
    after = objective(engine, batch).mean()
    found["loss_after"] = ranks.sum(after.detach()) / ranks.world_size
    directory = out / f"{name}-{kind}-{stage}"
    with CheckpointWriter(str(directory), CONFIG, ranks, shapes) as writer:
        writer.start(state, Progress(step=1, num_updates=state.num_updates()))
        writer.finish()
    ranks.barrier()
    if ranks.is_rank_zero:
        weights = Checkpoint(step_directory(str(directory), 1)).read_whole("weight")
        found |= {f"after.{key}": tensor.clone() for key, tensor in weights}
        save_file(
            {key: value.contiguous() for key, value in found.items()}, f"{directory}.safetensors"
        )


def main() -> None:
    """Take a step of a family, whole or by LoRA, at a ZeRO stage, in each way."""
    which, out = sys.argv[-2], Path(sys.argv[-1])
    os.environ.setdefault("LOCAL_RANK", "0")
    ranks = join_ranks()
    for name, kind, stage in SAMPLE if which == "sample" else WAYS:
        if ranks.world_size > 1 or stage == 0:
            take_step(name, kind, stage, ranks, out)


if __name__ == "__main__":
    main()
