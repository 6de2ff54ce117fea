"""DeepSpeed: the only module that imports it. Builds the engine, reaches its float32 weights."""

from __future__ import annotations

import logging
import os
from typing import Any

import torch
from torch import Tensor, nn

from d2i.config import TrainConfig


def join_ranks() -> tuple[int, int]:
    """Join the other ranks.

    Returns:
        (rank, world_size).
    """
    deepspeed = _import_deepspeed()
    if not torch.cuda.is_available():
        # One thread a rank: sums are taken in one order, whatever the machine has.
        torch.set_num_threads(1)
        # The shared-memory kernel serves inference only, and would need a C++ compiler here.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(verbose=False)
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def build_engine(
    network: nn.Module, config: TrainConfig, micro_batch_size: int, num_micro_batches: int
) -> Any:
    """Return a DeepSpeed engine around the network, with AdamW over all of its parameters.

    Weight decay acts on every parameter, as published (models.md, section 2.2).
    """
    deepspeed = _import_deepspeed()
    optim = config.optim
    optimizer = torch.optim.AdamW(
        network.parameters(),
        lr=optim.lr,
        betas=optim.betas,
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        fused=True,
    )
    settings = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": num_micro_batches,
        "zero_optimization": {"stage": config.zero_stage},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": config.precision == "bf16"},
        "steps_per_print": 2**31,
    }
    engine, *_ = deepspeed.initialize(model=network, optimizer=optimizer, config=settings)
    return engine


def base_optimizer(engine: Any) -> torch.optim.Optimizer:
    """Return the AdamW under the engine's ZeRO wrapper."""
    optimizer = engine.optimizer
    while not isinstance(optimizer, torch.optim.AdamW):
        optimizer = optimizer.optimizer
    return optimizer


def master_weights(engine: Any) -> list[Tensor]:
    """Return the float32 tensors this rank's optimizer steps: partitions under ZeRO."""
    return [p for group in base_optimizer(engine).param_groups for p in group["params"]]


def full_weights(engine: Any) -> dict[str, Tensor]:
    """Return every float32 weight, whole, by its published key; every rank must call this."""
    from deepspeed.utils import safe_get_full_fp32_param

    weights = {}
    for name, parameter in engine.module.named_parameters():
        full = safe_get_full_fp32_param(parameter)
        source = parameter if full is None else full
        weights[name] = source.detach().float().cpu().clone()
    return weights


def _import_deepspeed() -> Any:
    # DeepSpeed and its op builders talk on import; a rank has its own progress line.
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.ERROR)
    return deepspeed
