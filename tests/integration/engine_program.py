"""The program that every rank of `test_engine.py` runs: golden steps at every ZeRO stage.

    deepspeed --num_accelerators 2 tests/integration/engine_program.py GOLDEN WHICH OUT

Trains in the ways of the tables below, without those of `SOAK` if `WHICH` is `sample`.

Writes `OUT/WAY.safetensors` (losses, weights and EMA after four golden steps), and
`OUT/A-to-B.safetensors` (two steps in way A, a checkpoint, two steps in way B). For each lower
precision, with one sample per micro batch: `OUT/PRECISION-WAY-N.safetensors` after N = 0 and 4
steps, and `OUT/PRECISION-WAY-again.safetensors` after two steps, a checkpoint and two more. A
single rank runs only the lower precisions at the recipe's own stage.
"""

from __future__ import annotations

import itertools
import os
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from d2i.config import OptimConfig, TrainConfig
from d2i.diffusion import noise_prediction_loss
from d2i.models import build_backbone, family, load_weights
from d2i.train.checkpoint.checkpoint_files import Checkpoint, Progress, step_directory
from d2i.train.checkpoint.checkpoint_writer import CheckpointWriter, TrainState
from d2i.train.checkpoint.ema import Ema
from d2i.train.distributed.engine import (
    base_optimizer,
    build_engine,
    join_ranks,
    master_weights,
    read_zero,
    trained_parameters,
)
from d2i.train.distributed.ranks import Ranks
from d2i.train.network import autocast_to, compile_blocks, load_trained

SIZES = {"latent_size": 8, "patch_size": 2, "dim": 64, "depth": 4, "num_heads": 4}
ZERO_FILES = Path(__file__).parents[2] / "train"
STAGES = ("zero-0", "zero-1", "zero-2", "zero-3", "zero-2-offload", "zero-3-offload")
# Compiled blocks at the recipe's ZeRO stage, 1.
COMPILED = "compiled"
CHANGES = (
    ("zero-0", "zero-3"),
    ("zero-3", "zero-2-offload"),
    ("zero-3-offload", "zero-2"),
    ("zero-1", "zero-0"),
    (COMPILED, COMPILED),
)

# The golden optimizer, with eight samples per step.
CONFIG = TrainConfig(
    num_steps=4,
    global_batch_size=8,
    micro_batch_size=8,
    optim=OptimConfig(lr=3e-3, num_warmup_steps=2),
    precision="fp32",
    ema_rate=0.9,
)
LOWER = {
    name: CONFIG.model_copy(update={"precision": name, "micro_batch_size": 1})
    for name in ("bf16", "bf16_weights")
}
# The recipe's own ZeRO stage: 1, or 0 for one rank.
RECIPE = "recipe"
LOWER_RUNS = tuple(itertools.product(LOWER, ("zero-0", RECIPE, "zero-2", "zero-3")))
PART_RUNS = tuple(
    itertools.product(("fp32", "bf16_weights"), ("zero-0", "zero-1", "zero-2", "zero-3"))
)
# What only `make soak` runs: the rest still has every precision, every stage, and its resumption.
SOAK_LOWER = {(precision, way) for precision in LOWER for way in ("zero-0", "zero-2")}
SOAK_PART = {("bf16_weights", way) for way in ("zero-0", "zero-2")}
SOAK_CHANGES = {("zero-3", "zero-2-offload"), ("zero-1", "zero-0")}
FROZEN, UNUSED = "in_blocks.0", "unused"


def begin(
    golden: Path,
    way: str,
    ranks: Ranks,
    checkpoint: Checkpoint | None = None,
    config: TrainConfig = CONFIG,
) -> TrainState:
    """Return the training state of the golden network, or of a checkpoint, in a way."""
    network = build_backbone("uvit-s", **SIZES, text_dim=32, num_text_tokens=7)
    load_weights(network, golden / "uvit_tiny.safetensors")
    if checkpoint:
        network.load_state_dict(dict(checkpoint.read_whole("weight")))
    autocast_to(network, config.precision)
    zero = None
    if way == COMPILED:
        compile_blocks(family("uvit").blocks(network))
    elif way != RECIPE:
        zero = read_zero(ZERO_FILES / f"{way}.json")
    engine = build_engine(network, config, ranks.world_size, zero)
    state = TrainState(engine, Ema(master_weights(engine), 0.9))
    if checkpoint:
        state.restore(checkpoint)
    else:
        state.begin()
    return state


def train_part(golden: Path, out: Path, ranks: Ranks, precision: str, way: str) -> None:
    """Take four steps of a network of which one block is frozen and one parameter has no gradient.

    After two of them, go on from a checkpoint.
    """
    state = begin_part(golden, precision, way, ranks)
    losses = take_steps(state, golden, ranks, range(2))
    half = keep(state, ranks, out / f"part-{precision}-{way}-half", losses)
    losses += take_steps(state, golden, ranks, range(2, 4))
    keep(state, ranks, out / f"part-{precision}-{way}", losses)
    state = begin_part(golden, precision, way, ranks, half)
    losses[2:] = take_steps(state, golden, ranks, range(2, 4))
    keep(state, ranks, out / f"part-{precision}-{way}-again", losses)


def begin_part(
    golden: Path, precision: str, way: str, ranks: Ranks, checkpoint: Checkpoint | None = None
) -> TrainState:
    config = CONFIG.model_copy(update={"precision": precision})
    network = build_backbone("uvit-s", **SIZES, text_dim=32, num_text_tokens=7)
    load_weights(network, golden / "uvit_tiny.safetensors")
    network.get_submodule(FROZEN).requires_grad_(False)
    network.register_parameter(UNUSED, torch.nn.Parameter(torch.ones(5)))
    if checkpoint:
        load_trained(network, dict(checkpoint.read_whole("weight")))
    engine = build_engine(network, config, ranks.world_size, read_zero(ZERO_FILES / f"{way}.json"))
    state = TrainState(engine, Ema(master_weights(engine), 0.9))
    if checkpoint:
        state.restore(checkpoint)
    else:
        state.begin()
    return state


def golden_batch(golden: Path, ranks: Ranks) -> list[Tensor]:
    """Return this rank's part of the golden batch: latents, text, times and noise."""
    with np.load(golden / "losses.npz", allow_pickle=False) as stored:
        names = ("uvit_x0", "uvit_context", "uvit_n", "uvit_eps")
        return [torch.from_numpy(stored[n]).chunk(ranks.world_size)[ranks.rank] for n in names]


def learning_rate(step: int) -> float:
    """Return the golden learning rate, with two warm-up steps."""
    return 3e-3 * min(step / 2, 1)


def take_steps(state: TrainState, golden: Path, ranks: Ranks, steps: range) -> list[float]:
    """Take golden steps on this rank's part of the batch; return the losses over all ranks."""
    half = golden_batch(golden, ranks)
    num_micro_batches = state.engine.gradient_accumulation_steps()
    losses = []
    for step in steps:
        for group in base_optimizer(state.engine).param_groups:
            group["lr"] = learning_rate(step)
        mean = torch.tensor(0.0)
        for x0, text, n, eps in zip(*(t.chunk(num_micro_batches) for t in half), strict=True):
            loss = noise_prediction_loss(state.engine, x0, text, n, eps).mean()
            state.engine.backward(loss)
            state.engine.step()
            mean += loss.detach() / num_micro_batches
        state.ema.update()
        losses.append(float(ranks.sum(mean) / ranks.world_size))
    return losses


def keep(state: TrainState, ranks: Ranks, directory: Path, losses: list[float]) -> Checkpoint:
    """Write a checkpoint as training does; also write its whole content as one file."""
    shapes = {
        name: tuple(getattr(parameter, "ds_shape", parameter.shape))
        for name, parameter in trained_parameters(state.engine.module)
    }
    with CheckpointWriter(str(directory), CONFIG, ranks, shapes) as writer:
        progress = Progress(step=len(losses), num_updates=state.num_updates())
        writer.start(state, progress)
        writer.finish()
    ranks.barrier()
    checkpoint = Checkpoint(step_directory(str(directory), len(losses)))
    checkpoint.check()
    whole: dict[str, Tensor] = {"losses": torch.tensor(losses, dtype=torch.float64)}
    for kind in ("weight", "ema"):
        whole |= {f"{kind}:{name}": t.clone() for name, t in checkpoint.read_whole(kind)}
    if ranks.is_rank_zero:
        save_file(whole, directory.with_suffix(".safetensors"))
    return checkpoint


def train_lower(golden: Path, out: Path, ranks: Ranks, precision: str, way: str) -> None:
    """Take four steps in a lower precision: without a break, and with a checkpoint after two."""
    state = begin(golden, way, ranks, config=LOWER[precision])
    keep(state, ranks, out / f"{precision}-{way}-0", [])
    losses = take_steps(state, golden, ranks, range(2))
    half = keep(state, ranks, out / f"{precision}-{way}-half", losses)
    losses += take_steps(state, golden, ranks, range(2, 4))
    keep(state, ranks, out / f"{precision}-{way}-4", losses)
    state = begin(golden, way, ranks, half, LOWER[precision])
    losses[2:] = take_steps(state, golden, ranks, range(2, 4))
    keep(state, ranks, out / f"{precision}-{way}-again", losses)


def main() -> None:
    """Train in every way, and resume in another way."""
    which = sys.argv[-2]
    golden, out = Path(sys.argv[-3]), Path(sys.argv[-1])
    os.environ.setdefault("LOCAL_RANK", "0")
    ranks = join_ranks()

    def asked(
        runs: tuple[tuple[str, str], ...], soak: set[tuple[str, str]]
    ) -> list[tuple[str, str]]:
        return [run for run in runs if which == "all" or run not in soak]

    for precision, way in asked(LOWER_RUNS, SOAK_LOWER):
        if ranks.world_size > 1 or way == RECIPE:
            train_lower(golden, out, ranks, precision, way)
    if ranks.world_size == 1:
        return
    for way in (*STAGES, COMPILED):
        state = begin(golden, way, ranks)
        losses = take_steps(state, golden, ranks, range(4))
        keep(state, ranks, out / way, losses)
    for precision, way in asked(PART_RUNS, SOAK_PART):
        train_part(golden, out, ranks, precision, way)
    for first, then in asked(CHANGES, SOAK_CHANGES):
        state = begin(golden, first, ranks)
        losses = take_steps(state, golden, ranks, range(2))
        checkpoint = keep(state, ranks, out / f"half-{first}", losses)
        state = begin(golden, then, ranks, checkpoint)
        losses += take_steps(state, golden, ranks, range(2, 4))
        keep(state, ranks, out / f"{first}-to-{then}", losses)
    ranks.barrier()


if __name__ == "__main__":
    main()
