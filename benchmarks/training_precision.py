"""Effect of lower training precision on the trained weights.

    python benchmarks/training_precision.py --markdown precision.md

Fine-tunes a tiny U-ViT for 850 steps with the paper's optimizer and 13 micro batches per step (like
UniDiffuser's recipe on PhotoChat on two devices), by DeepSpeed as `d2i train` does: in float32, in
`bf16` (autocast over float32 weights) and in `bf16_weights` (the whole network). All start from the
same trained weights and use the same samples, noise and times. Reported are the distance of the
final weights from those of float32, relative to how far these moved, and the loss on fixed draws,
computed in float32. Two baselines: float32 with one micro batch (another order of sums), and
float32 with other noise and data order. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d2i.config import TrainConfig, TrainPrecision, apply_settings
from d2i.diffusion import noise_prediction_loss
from d2i.models import build_backbone
from d2i.recipes import load_recipe
from d2i.train.distributed.engine import build_engine, join_ranks, list_parts, master_weights
from d2i.train.network import autocast_to

SIZES = {"latent_size": 8, "patch_size": 2, "dim": 32, "depth": 2, "num_heads": 2}
TEXT = {"text_dim": 16, "num_text_tokens": 4}
NUM_SAMPLES = 520
MICRO_BATCH_SIZE, NUM_MICRO_BATCHES = 2, 13
BATCH_SIZE = MICRO_BATCH_SIZE * NUM_MICRO_BATCHES
NUM_FIXED_DRAWS = 512
PRETRAINING_RATE = 1e-3
FORMS: dict[str, tuple[TrainPrecision, int, int]] = {
    "float32": ("fp32", MICRO_BATCH_SIZE, 1),
    "bf16": ("bf16", MICRO_BATCH_SIZE, 1),
    "bf16_weights": ("bf16_weights", MICRO_BATCH_SIZE, 1),
    "float32, one micro batch": ("fp32", BATCH_SIZE, 1),
    "float32, other noise and order": ("fp32", BATCH_SIZE, 2),
}

Draw = tuple[Tensor, Tensor, Tensor, Tensor]


class World:
    """Synthetic samples: texts (N, 4, 16) and their linear latents (N, 4, 8, 8) plus 10 % noise."""

    def __init__(self, seed: int) -> None:
        made = torch.Generator().manual_seed(seed)
        self.text = torch.randn(NUM_SAMPLES, 4, 16, generator=made)
        mapping = torch.randn(4 * 16, 4 * 8 * 8, generator=made) / 8
        signal = (self.text.flatten(1) @ mapping).view(-1, 4, 8, 8)
        self.latents = signal + 0.1 * torch.randn(signal.shape, generator=made)

    def draw(self, size: int, draws: torch.Generator) -> Draw:
        """Draw samples, noise and times: latents, text, n, noise."""
        rows = torch.randint(NUM_SAMPLES, (size,), generator=draws)
        latents = self.latents[rows]
        noise = torch.randn(latents.shape, generator=draws)
        n = torch.randint(1, 1001, (size,), generator=draws)
        return latents, self.text[rows], n, noise


def build(weights: dict[str, Tensor] | None = None) -> Any:
    """Return the tiny network with the given weights."""
    torch.manual_seed(0)
    network = build_backbone("uvit-s", **SIZES, **TEXT)
    if weights:
        network.load_state_dict(weights)
    return network


def loss_of(network: Any, draw: Draw) -> Tensor:
    """Return the mean loss of a draw."""
    latents, text, n, noise = draw
    return noise_prediction_loss(network, latents, text, n, noise).mean()


def pretrain(num_steps: int) -> dict[str, Tensor]:
    """Return weights trained on another world, in float32."""
    network, world, draws = build(), World(0), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(network.parameters(), lr=PRETRAINING_RATE, fused=True)
    for _ in range(num_steps):
        loss_of(network, world.draw(2 * BATCH_SIZE, draws)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: weight.detach().clone() for name, weight in network.named_parameters()}


def fine_tune(start: dict[str, Tensor], config: TrainConfig, seed: int) -> dict[str, Tensor]:
    """Return the float32 weights after the recipe's steps."""
    network, world, draws = build(start), World(1), torch.Generator().manual_seed(seed)
    autocast_to(network, config.precision)
    engine = build_engine(network, config, 1)
    _, num_micro_batches = config.accumulation(1)
    for _ in range(config.num_steps):
        whole = world.draw(BATCH_SIZE, draws)
        for draw in zip(*(part.chunk(num_micro_batches) for part in whole), strict=True):
            engine.backward(loss_of(engine, draw))
            engine.step()
    masters = master_weights(engine)
    return {
        part.name: part.of(masters).clone().view_as(start[part.name]) for part in list_parts(engine)
    }


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Return the Euclidean distance of all weights together."""
    return sum(float((found[k] - expected[k]).square().sum()) for k in expected) ** 0.5


def fixed_loss(weights: dict[str, Tensor]) -> float:
    """Return the loss on draws that are the same for all weights, in float32."""
    with torch.no_grad():
        draw = World(1).draw(NUM_FIXED_DRAWS, torch.Generator().manual_seed(99))
        return float(loss_of(build(weights), draw))


def measure(num_steps: int, num_pretraining_steps: int) -> dict[str, Any]:
    """Fine-tune in every precision and compare."""
    start = pretrain(num_pretraining_steps)
    published = load_recipe("uvit-s-photochat").train
    rows, exact = {}, None
    for name, (precision, micro_batch_size, seed) in FORMS.items():
        settings = {
            "num_steps": num_steps,
            "global_batch_size": BATCH_SIZE,
            "micro_batch_size": micro_batch_size,
            "precision": precision,
        }
        config = apply_settings(published, [f"{k}={v}" for k, v in settings.items()])
        started = time.process_time()
        weights = fine_tune(start, config, seed)
        seconds = time.process_time() - started
        exact = exact or weights
        rows[name] = {
            "distance": round(distance(weights, exact) / distance(exact, start), 5),
            "loss": round(fixed_loss(weights), 5),
            "seconds": round(seconds, 1),
        }
    return {"loss_at_start": round(fixed_loss(start), 5), "forms": rows}


def table(result: dict[str, Any]) -> str:
    """Return the result as Markdown."""
    lines = [
        "| | distance from float32's weights, of their way | loss on fixed draws |",
        "|---|---|---|",
        f"| before | - | {result['loss_at_start']:.5f} |",
    ]
    lines += [
        f"| {name} | {row['distance']:.2%} | {row['loss']:.5f} |"
        for name, row in result["forms"].items()
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=850)
    parser.add_argument("--pretraining-steps", type=int, default=1000)
    parser.add_argument("--markdown", type=Path, help="file to write the table to")
    args = parser.parse_args()
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29873")
    join_ranks()
    result = {"benchmark": "training precision", "steps": args.steps}
    result |= {"num_micro_batches": NUM_MICRO_BATCHES, "micro_batch_size": MICRO_BATCH_SIZE}
    result |= measure(args.steps, args.pretraining_steps)
    result["machine"] = f"{platform.machine()}, Python {platform.python_version()}"
    print(json.dumps(result))
    if args.markdown:
        args.markdown.write_text(table(result))


if __name__ == "__main__":
    main()
