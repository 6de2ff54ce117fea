"""A LoRA step of Stable Diffusion 1.5 beside the loop of diffusers' training script.

    python benchmarks/lora.py --pairs 5 --latent-size 32

The published UNet with random weights, a LoRA of rank 16, one sample a step in float32, in one
process. `peer` is the step of diffusers' text-to-image LoRA script (examples/text_to_image, its
loop without accelerate): noise, times, UNet, loss, backward, clipping, AdamW. `ours` is d2i's:
keyed draws, DeepSpeed's engine, loss, backward, clipping, AdamW and two averages. The two take
turns; a pair's ratio is the peer's wall-clock seconds over ours, so above 1 d2i is faster.

Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from d2i.backbones import presets_of
from d2i.config import AdapterConfig, TrainConfig, apply_settings
from d2i.diffusion.draws import BatchDraws
from d2i.models import build_backbone, family
from d2i.models.lora import add_lora
from d2i.recipes import load_recipe
from d2i.train.checkpoint.checkpoint_writer import build_state
from d2i.train.data.batch import Batch
from d2i.train.distributed.engine import build_engine, join_ranks
from d2i.train.objective import build_objective

ADAPTER = AdapterConfig(kind="lora")
SCALE = 0.18215


def step_config() -> TrainConfig:
    """Return the recipe's training at one sample a step, in float32."""
    settings = ["train.global_batch_size=1", "train.micro_batch_size=1", "train.precision=fp32"]
    config: TrainConfig = apply_settings(load_recipe("sd15-lora-photochat"), settings).train
    return config


def build_network(latent_size: int) -> Any:
    """Return the published UNet with random weights, and a LoRA."""
    torch.manual_seed(0)
    network: Any = build_backbone("sd15", latent_size=latent_size)
    add_lora(network, ADAPTER, presets_of("sd15"), seed=0)
    return network


def our_step(
    network: Any, config: TrainConfig, moments: Tensor, text: Tensor
) -> Callable[[], None]:
    """Return d2i's step, draws included."""
    engine = build_engine(network, config, 1)
    state = build_state(engine, config)
    objective = build_objective(family("sd15"), {"scaling_factor": SCALE}, config)
    shape = (4, *moments.shape[2:])
    taken = iter(range(10**6))

    def step() -> None:
        draws = BatchDraws(config.seed, ("key",), next(taken))
        batch = Batch(
            keys=("key",),
            image=moments,
            latent_noise=torch.from_numpy(draws.normal("latent", shape)),
            noise=torch.from_numpy(draws.normal("noise", shape)),
            draw=torch.from_numpy(draws.model_times("n") - 1),
            conditions={"text": text},
        )
        engine.backward(objective(engine, batch).mean())
        engine.step()
        state.update_averages()

    return step


def peer_step(
    network: Any, config: TrainConfig, moments: Tensor, text: Tensor
) -> Callable[[], None]:
    """Return the step of diffusers' script."""
    from diffusers import DDPMScheduler

    optim = config.optim
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    layers = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        layers, lr=optim.lr, betas=optim.betas, weight_decay=optim.weight_decay, eps=optim.eps
    )
    mean, logvar = moments.chunk(2, dim=1)
    deviation = torch.exp(0.5 * logvar)

    def step() -> None:
        latents = (mean + deviation * torch.randn_like(mean)) * SCALE
        noise = torch.randn_like(latents)
        times = torch.randint(0, scheduler.config.num_train_timesteps, (len(latents),))
        noisy = scheduler.add_noise(latents, noise, times)
        predicted = network(noisy, times, text, return_dict=False)[0]
        torch.nn.functional.mse_loss(predicted.float(), noise.float()).backward()
        torch.nn.utils.clip_grad_norm_(layers, optim.max_grad_norm or float("inf"))
        optimizer.step()
        optimizer.zero_grad()

    return step


def seconds_of(step: Callable[[], None]) -> float:
    """Return the wall-clock seconds of a step."""
    started = time.perf_counter()
    step()
    return time.perf_counter() - started


def main() -> None:
    """Time both steps by turns, after one of each as a warm-up."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=5, help="Pairs of steps.")
    parser.add_argument("--latent-size", type=int, default=32, help="Side in latent pixels.")
    args = parser.parse_args()
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29873")
    join_ranks()
    config = step_config()
    random = np.random.default_rng(0)
    side = args.latent_size
    moments = torch.from_numpy(random.standard_normal((1, 8, side, side), dtype=np.float32))
    text = torch.from_numpy(random.standard_normal((1, 77, 768), dtype=np.float32))
    ours = our_step(build_network(side), config, moments, text)
    peer = peer_step(build_network(side), config, moments, text)
    seconds_of(ours), seconds_of(peer)
    pairs = [(seconds_of(ours), seconds_of(peer)) for _ in range(args.pairs)]
    ratios = [theirs / our for our, theirs in pairs]
    result = {
        "latent_size": side,
        "ours_s": [round(our, 3) for our, _ in pairs],
        "peer_s": [round(theirs, 3) for _, theirs in pairs],
        "ratio_median": round(statistics.median(ratios), 3),
        "ratio_range": [round(min(ratios), 3), round(max(ratios), 3)],
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
