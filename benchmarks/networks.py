"""Speed of an optimizer step, compared with a plain implementation and diffusers' network.

    python benchmarks/networks.py --repeats 5

`uvit`: U-ViT-S at full size against the same network with explicit attention (softmax of q k^T),
torch's default AdamW and a plain EMA loop. `unidiffuser`: UniDiffuser at a medium size against
diffusers' `UniDiffuserModel` with the same weights, both with fused AdamW. `--compile d2i` compiles
d2i's blocks as `train.compile` does, `--compile both` those of the other network as well. Steps
alternate, on a CPU with one thread as in each rank of training, or with `--threads`; a ratio is
that of one adjacent pair, above 1 if d2i is faster, by CPU time (of all threads together) and by
wall-clock time. FLOPs are counted by torch's `FlopCounterMode` on the meta device, 2 per
multiply-add, forward and backward. Prints one JSON line with all repeats.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from d2i.diffusion import noise_prediction_loss
from d2i.models import build_backbone, family
from d2i.models.blocks import Attention
from d2i.models.unidiffuser.layout import diffusers_config, to_diffusers
from d2i.models.unidiffuser.objective import unidiffuser_loss
from d2i.train.checkpoint.ema import Ema
from d2i.train.network import compile_blocks

MIDDLE: dict[str, Any] = {"dim": 512, "depth": 12, "num_heads": 8, "latent_size": 32}
OPTIMIZER: dict[str, Any] = {"lr": 1e-5, "betas": (0.9, 0.9), "weight_decay": 0.03}
EMA_RATE = 0.9999
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Step = Callable[[], float]


class PlainAttention(nn.Module):
    """The same attention, computed explicitly."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.num_heads, self.qkv, self.proj = attention.num_heads, attention.qkv, attention.proj

    def forward(self, x: Tensor) -> Tensor:
        """Attend with the whole attention matrix in memory."""
        batch, length, dim = x.shape
        heads = self.qkv(x).view(batch, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = heads.unbind(0)
        weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(batch, length, dim))


class PlainAverage:
    """The EMA, updated parameter by parameter."""

    def __init__(self, parameters: list[Tensor]) -> None:
        self._pairs = [(parameter.detach().clone(), parameter) for parameter in parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Update the EMA with the current weights."""
        for average, parameter in self._pairs:
            average.mul_(EMA_RATE).add_(parameter, alpha=1 - EMA_RATE)


def build_step(
    network: nn.Module,
    loss: Callable[[nn.Module], Tensor],
    optimizer: torch.optim.Optimizer,
    average: Ema | PlainAverage,
    options: argparse.Namespace,
) -> Step:
    """Return a function that takes a step (forward, backward, AdamW, EMA) and returns its loss."""

    def rounded() -> AbstractContextManager[Any]:
        dtype = DTYPES[options.dtype]
        half = dtype != torch.float32
        return torch.autocast(options.device, dtype) if half else nullcontext()

    def step() -> float:
        optimizer.zero_grad()
        with rounded():
            mean = loss(network)
        mean.backward()
        optimizer.step()
        average.update()
        return mean.item()

    return step


def uvit_steps(options: argparse.Namespace) -> dict[str, Step]:
    """Return the steps of U-ViT-S by d2i and by a plain implementation."""
    ours, plain = seeded("uvit-s", options), seeded("uvit-s", options)
    for block in [*plain.in_blocks, plain.mid_block, *plain.out_blocks]:
        block.attn = PlainAttention(block.attn)
    latent, text = random_input(options, 4, 32, 32), random_input(options, 77, 768)
    n = torch.randint(1, 1001, (options.batch,), device=options.device)
    noise = torch.randn_like(latent)

    def loss(network: nn.Module) -> Tensor:
        return noise_prediction_loss(network, latent, text, n, noise).mean()

    fused = torch.optim.AdamW(ours.parameters(), **OPTIMIZER, fused=True)
    default = torch.optim.AdamW(plain.parameters(), **OPTIMIZER)
    averages = Ema(list(ours.parameters()), EMA_RATE), PlainAverage(list(plain.parameters()))
    return {
        "d2i": build_step(compiled(ours, "d2i", options), loss, fused, averages[0], options),
        "plain": build_step(compiled(plain, "plain", options), loss, default, averages[1], options),
    }


def unidiffuser_steps(options: argparse.Namespace) -> dict[str, Step]:
    """Return the steps of UniDiffuser by d2i and by diffusers' network with the same weights."""
    from diffusers.pipelines.deprecated.unidiffuser.modeling_uvit import UniDiffuserModel

    ours = seeded("unidiffuser-v1", options)
    config = {key: v for key, v in diffusers_config(ours).items() if key != "_class_name"}
    theirs = UniDiffuserModel(**config).to(options.device)
    theirs.load_state_dict(to_diffusers(ours.state_dict()))
    parts = [
        random_input(options, 4, 32, 32),
        random_input(options, 1, 512),
        random_input(options, 77, 64),
    ]
    noises = [torch.randn_like(part) for part in parts]
    n_image, n_text = torch.randint(1, 1001, (2, options.batch), device=options.device)

    def loss(network: nn.Module) -> Tensor:
        return unidiffuser_loss(network, parts, n_image, n_text, noises).mean()

    steps = {}
    for name, network in (("d2i", ours), ("diffusers", theirs)):
        # diffusers' network has a patch projection without a gradient; AdamW skips it.
        optimizer = torch.optim.AdamW(network.parameters(), **OPTIMIZER, fused=True)
        average = Ema(list(network.parameters()), EMA_RATE)
        network = compiled(network, name, options)
        steps[name] = build_step(network, loss, optimizer, average, options)
    return steps


STEPS = {"uvit": uvit_steps, "unidiffuser": unidiffuser_steps}


def seeded(name: str, options: argparse.Namespace) -> Any:
    """Build a network with the same weights each time."""
    torch.manual_seed(0)
    sizes = MIDDLE if name.startswith("unidiffuser") else {}
    return build_backbone(name, **sizes).to(options.device)


def random_input(options: argparse.Namespace, *shape: int) -> Tensor:
    """Draw a random input."""
    return torch.randn(options.batch, *shape, device=options.device)


def compiled(network: Any, name: str, options: argparse.Namespace) -> Any:
    """Compile a network if requested: the blocks of d2i's, or the whole of another."""
    if options.compile == "both" or options.compile == name:
        if hasattr(network, "in_blocks"):
            compile_blocks(family("uvit").blocks(network))
        else:
            network.compile()
    return network


def timed(step: Step, device: str) -> dict[str, float]:
    """Take one step; return its wall-clock seconds, its CPU seconds and its loss."""
    wall, cpu = time.perf_counter(), time.process_time()
    loss = step()
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - wall
    return {"wall_s": seconds, "cpu_s": time.process_time() - cpu, "loss": loss}


class LinearLayers(TorchDispatchMode):
    """Counts the CPU seconds of the matrix products of linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds = 0.0

    def __torch_dispatch__(
        self, operation: Any, _types: Any, arguments: Any = (), named: Any = None
    ) -> Any:
        """Run an operation, and count its time if it is such a product."""
        started = time.process_time()
        result = operation(*arguments, **(named or {}))
        if operation in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            self.seconds += time.process_time() - started
        return result


def seconds_of_linear_layers(step: Step, options: argparse.Namespace) -> float | None:
    """Measure linear layers, a lower bound for a step; only on a CPU, where calls block."""
    if options.device != "cpu" or options.compile == "both":
        return None
    with LinearLayers() as layers:
        step()
    return round(layers.seconds, 3)


def gflop_per_image(name: str) -> float:
    """Count the forward and backward FLOPs of one image."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        latent, text, n = torch.randn(1, 4, 32, 32), torch.randn(1, 77, 768), torch.ones(1)
        if name == "uvit":
            build_backbone("uvit-s")(latent, n, text).sum().backward()
        else:
            network = build_backbone("unidiffuser-v1", **MIDDLE)
            outputs = network(latent, torch.randn(1, 1, 512), text[..., :64], n, n)
            torch.stack([output.sum() for output in outputs]).sum().backward()
    return counter.get_total_flops() / 1e9


def matrix_gflops(options: argparse.Namespace) -> float:
    """Measure the rate of a large matrix product in the same dtype, best of five."""
    size = 8192 if options.device == "cuda" else 2048
    left, right = torch.randn(2, size, size, device=options.device, dtype=DTYPES[options.dtype])
    rates = []
    for _ in range(5):
        seconds = timed(lambda: float((left @ right)[0, 0]), options.device)["wall_s"]
        rates.append(2 * size**3 / seconds / 1e9)
    return max(rates)


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Take the steps of both alternately, after a warm-up step."""
    steps = STEPS[name](options)
    other = next(key for key in steps if key != "d2i")
    first = {key: timed(step, options.device)["loss"] for key, step in steps.items()}
    if abs(first["d2i"] - first[other]) > 0.01 * first[other]:
        raise SystemExit(f"{name}: the two losses differ: {first}")
    times: dict[str, list[dict[str, float]]] = {key: [] for key in steps}
    for repeat in range(options.repeats):
        for key in steps if repeat % 2 else reversed(list(steps)):
            times[key].append(timed(steps[key], options.device))
        print(f"{name}, repeat {repeat + 1}: {[t[-1] for t in times.values()]}", file=sys.stderr)
    ratios = {
        kind: [b[kind] / a[kind] for a, b in zip(times["d2i"], times[other], strict=True)]
        for kind in ("wall_s", "cpu_s")
    }
    wall = statistics.median(t["wall_s"] for t in times["d2i"])
    gflop = gflop_per_image(name)
    return {
        "beside": other,
        "ratio_wall": spread(ratios["wall_s"]),
        "ratio_cpu": spread(ratios["cpu_s"]),
        "seconds_d2i": spread([t["wall_s"] for t in times["d2i"]]),
        "cpu_seconds_d2i": spread([t["cpu_s"] for t in times["d2i"]]),
        "cpu_seconds_of_linear_layers": seconds_of_linear_layers(steps[other], options),
        "gflop_per_image": round(gflop, 2),
        "gflops": round(gflop * options.batch / wall, 1),
    }


def spread(values: list[float]) -> dict[str, Any]:
    """Return the median and every repeat."""
    return {"median": round(statistics.median(values), 3), "all": [round(v, 3) for v in values]}


def machine(options: argparse.Namespace) -> dict[str, object]:
    """Describe the machine."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    found: dict[str, object] = {
        "processor": names[0] if names else platform.machine(),
        "cores": len(names),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if options.device == "cuda":
        found["accelerator"] = torch.cuda.get_device_name()
    return found


def main() -> None:
    """Measure and print one JSON line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--networks", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="by autocast")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--compile", choices=("none", "d2i", "both"), default="none")
    parser.add_argument("--threads", type=int, default=1, help="on a CPU")
    options = parser.parse_args()
    if options.device == "cpu":
        # Threads that wait for each other would add CPU time.
        torch.set_num_threads(options.threads)
    found = {name: measure(name, options) for name in options.networks}
    measured = {"machine": machine(options), "matrix_gflops": round(matrix_gflops(options), 1)}
    print(json.dumps({"benchmark": "networks", **vars(options), **measured, **found}))


if __name__ == "__main__":
    main()
