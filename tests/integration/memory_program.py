"""The program that every rank of `test_reckoned_memory.py` runs: count an engine's tensors.

    deepspeed --num_accelerators 2 tests/integration/memory_program.py OUT BASE CASE…

Writes `OUT/CASE-RANK.json`: bytes by the names of `d2i.train.memory.Memory`. BASE is the directory
of a tiny Stable Diffusion, and a CASE is `NETWORK:PRECISION:STAGE`, such as `lora:bf16:2`.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d2i.config import Recipe
from d2i.diffusion.draws import BatchDraws
from d2i.models.registry import family_of_backbone
from d2i.recipes import resolve_recipe
from d2i.train.checkpoint.checkpoint_writer import TrainState, build_state
from d2i.train.data.batch import Batch
from d2i.train.distributed.engine import base_optimizer, build_engine, join_ranks, master_weights
from d2i.train.network import build_trained_network
from d2i.train.objective import build_objective
from tests.integration import fine_tuning, training

MICRO_BATCH_SIZE = 2
BUCKET = 1 << 20
_DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.float32,
    "bf16_weights": torch.bfloat16,
    "fp16_weights": torch.float16,
}
_NETWORKS = {
    "uvit": "demo",
    "full": fine_tuning.FULL,
    "lora": fine_tuning.LORA,
    "z-image": "z-image-lora-photochat",
    "flux2-klein": "flux2-klein-lora-photochat",
    "sana": "sana-photochat",
}

FLOW = ("z-image", "flux2-klein", "sana")
"""The networks whose directories are beside BASE."""


def zero_of(stage: int) -> dict[str, Any]:
    """Return ZeRO settings with a small bucket; DeepSpeed's default takes 2 GB."""
    return {"stage": stage} | ({"reduce_bucket_size": BUCKET} if stage else {})


def recipe_of(network: str, precision: str, base: Path, *settings: str) -> Recipe:
    """Return the recipe of a tiny network that trains on two micro batches a step."""
    if network == "uvit":
        given = [f"{name}={value}" for name, value in training.SETTINGS.items()]
    else:
        place = base.parent / network if network in FLOW else base
        given = fine_tuning.options(place)[1::2]
        if network in FLOW:
            # The size of latents follows from the resolution.
            given.remove("backbone.latent_size=8")
    given += [f"train.precision={precision}", f"train.micro_batch_size={MICRO_BATCH_SIZE}"]
    return resolve_recipe(_NETWORKS[network], [*given, *settings])


def random_batch(network: Any, recipe: Recipe, size: int) -> Batch:
    """Return a micro batch of random numbers, in the dtype that the network computes in."""
    family, dtype = family_of_backbone(recipe.backbone.name), _DTYPES[recipe.train.precision]
    codec, side = family.codec, network.latent_size
    shape = codec.latent_shape(side)
    draws = BatchDraws(0, [str(number) for number in range(size)], 0)
    (*_, example) = family.example_inputs(network)
    conditions = example if isinstance(example, dict) else {"text": example}
    return Batch(
        keys=(),
        image=torch.randn(size, *codec.array_shape(side), dtype=dtype),
        latent_noise=torch.randn(size, *shape, dtype=dtype),
        noise=torch.randn(size, *shape, dtype=dtype),
        draw=torch.from_numpy(family.draw_levels(draws, recipe.train)),
        conditions={
            # The longest texts.
            name: torch.ones(size, *value.shape[1:], dtype=torch.bool)
            if value.dtype == torch.bool
            else torch.randn(size, *value.shape[1:], dtype=dtype)
            for name, value in conditions.items()
        },
    )


def objective_of(network: Any, recipe: Recipe) -> Any:
    family = family_of_backbone(recipe.backbone.name)
    return build_objective(family, family.vae_numbers(network), recipe.train)


def storages(tensors: Iterable[Any]) -> dict[int, int]:
    """Return the bytes of every distinct storage, by its address."""
    found = (t.untyped_storage() for t in tensors if isinstance(t, Tensor))
    return {storage.data_ptr(): storage.nbytes() for storage in found if storage.nbytes()}


def num_bytes(tensors: Iterable[Any]) -> int:
    return sum(storages(tensors).values())


def state_bytes(engine: Any, state: TrainState) -> dict[str, int]:
    """Count the weights, those gathered included, and the state of the optimizer."""
    parameters = list(engine.module.parameters())
    partitions = [getattr(p, "ds_tensor", None) for p in parameters]
    weights = storages([*parameters, *partitions, *engine.module.buffers()])
    masters = storages(master_weights(engine))
    per_master = base_optimizer(engine).state.values()
    return {
        "weights": sum(weights.values()),
        "masters": sum(size for place, size in masters.items() if place not in weights),
        "moments": num_bytes(tensor for held in per_master for tensor in held.values()),
        "ema": num_bytes(t for average in state.averages.values() for t in average.tensors),
    }


def passing_bytes(engine: Any, stage: int) -> dict[str, int]:
    """Count gradients and buckets."""
    optimizer = engine.optimizer
    gradients: list[Any] = [p.grad for p in engine.module.parameters()]
    buckets: list[Any] = []
    if stage:
        held = [bucket.buffer for bucket in optimizer.ipg_buckets.values()]
        buckets = [t for one in held for t in (one if isinstance(one, list) else [one])]
    if stage == 2:
        groups = [*optimizer.averaged_gradients.values(), *optimizer.all_grad_tensors.values()]
        gradients += [tensor for group in groups for tensor in group or ()]
    if stage == 3:
        gradients.append(optimizer.grad_partitions_flat_buffer)
    return {"gradients": num_bytes(gradients), "buckets": num_bytes(buckets)}


def count(recipe: Recipe, stage: int, world_size: int) -> dict[str, int]:
    """Take a step of two micro batches; return the most bytes of every part."""
    network = build_trained_network(recipe)
    engine = build_engine(network, recipe.train, world_size, zero_of(stage))
    state = build_state(engine, recipe.train)
    objective = objective_of(network, recipe)
    batch = random_batch(network, recipe, MICRO_BATCH_SIZE)
    most: dict[str, int] = {}

    def note() -> None:
        found = passing_bytes(engine, stage) | state_bytes(engine, state)
        most.update({name: max(size, most.get(name, 0)) for name, size in found.items()})

    if stage == 2:
        release = engine.optimizer._release_ipg_buffers

        def release_counted() -> None:
            note()
            release()

        # The buckets are gone when the backward pass has ended.
        engine.optimizer._release_ipg_buffers = release_counted
    for _ in range(2):
        engine.backward(objective(engine, batch).mean())
        note()
        engine.step()
    return most


def main() -> None:
    """Count every case."""
    out, base, *cases = (word for word in sys.argv[1:] if not word.startswith("--local_rank"))
    os.environ.setdefault("LOCAL_RANK", "0")
    ranks = join_ranks()
    for case in cases:
        network, precision, stage = case.split(":")
        recipe = recipe_of(
            network,
            precision,
            Path(base),
            f"train.global_batch_size={2 * MICRO_BATCH_SIZE * ranks.world_size}",
        )
        found = count(recipe, int(stage), ranks.world_size)
        Path(out, f"{case}-{ranks.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
