"""Speed of guided sampling, compared with diffusers' own loop with as many network calls.

    python benchmarks/sampling.py --repeats 3

UniDiffuser at a medium size, 50 steps, guidance 8, new text noise at every call, conditional and
unconditional in one batch: d2i's published solver with its own network, and diffusers' pipeline
loop (`DPMSolverMultistepScheduler` with `UniDiffuserModel` of the same weights). Runs alternate; a
ratio is that of one adjacent pair, above 1 if d2i is faster. FLOPs are counted by torch's
`FlopCounterMode` on the meta device, 2 per multiply-add. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from d2i.diffusion import dpm_solver
from d2i.diffusion.draws import normal
from d2i.diffusion.schedulers import build_scheduler
from d2i.models import build_backbone
from d2i.models.unidiffuser.guidance import guided_unidiffuser, join_state, split_state
from d2i.models.unidiffuser.layout import diffusers_config, to_diffusers

MIDDLE: dict[str, Any] = {"dim": 512, "depth": 12, "num_heads": 8}
GUIDANCE = 8.0
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def build_both(options: argparse.Namespace) -> tuple[Any, Any]:
    """Build d2i's network and diffusers', with the same weights."""
    from diffusers.pipelines.deprecated.unidiffuser.modeling_uvit import UniDiffuserModel

    torch.manual_seed(0)
    ours = build_backbone("unidiffuser-v1", **MIDDLE, latent_size=options.latent_size)
    config = {key: v for key, v in diffusers_config(ours).items() if key != "_class_name"}
    theirs = UniDiffuserModel(**config)
    theirs.load_state_dict(to_diffusers(ours.state_dict()))
    place = {"device": options.device, "dtype": DTYPES[options.dtype]}
    networks = [network.to(**place).eval().requires_grad_(False) for network in (ours, theirs)]
    if options.compile:
        networks = [torch.compile(network) for network in networks]
    return networks[0], networks[1]


def latent_shape(options: argparse.Namespace) -> tuple[int, int, int]:
    """Return the shape of one latent."""
    return (4, options.latent_size, options.latent_size)


def d2i_run(network: Any, options: argparse.Namespace) -> Callable[[], Tensor]:
    """Return a function that runs d2i's whole sampler."""
    shape, keys = latent_shape(options), [f"test-{number}" for number in range(options.batch)]
    text = torch.from_numpy(normal(0, "text", keys, 0, (77, 64)))
    x = join_state(
        torch.from_numpy(normal(0, "sample", keys, 0, shape)),
        torch.from_numpy(normal(0, "sample.clip", keys, 0, (1, 512))),
    ).to(options.device)

    def text_noise(call: int) -> Tensor:
        return torch.from_numpy(normal(0, "sample.text", keys, call, (77, 64)))

    def run() -> Tensor:
        here = text.to(options.device)
        eps = guided_unidiffuser(network, here, GUIDANCE, shape, text_noise=text_noise)
        return dpm_solver(eps, x, options.steps)

    return run


def diffusers_run(network: Any, options: argparse.Namespace) -> Callable[[], Tensor]:
    """Return a function that runs the loop of diffusers' pipeline, both calls in one batch."""
    place = {"device": options.device, "dtype": DTYPES[options.dtype]}
    text = torch.randn(options.batch, 77, 64, **place)
    shape = latent_shape(options)
    start = torch.randn(options.batch, math.prod(shape) + 512, **place)

    def run() -> Tensor:
        scheduler = build_scheduler("DPMSolverMultistepScheduler")
        scheduler.set_timesteps(options.steps, device=options.device)
        state = start * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            latent, clip = split_state(torch.cat([state, state]), shape)
            both = torch.cat([text, torch.randn_like(text)])
            n_text = torch.tensor([0, 1000], device=t.device).repeat_interleave(options.batch)
            predicted = network(latent, clip, both, t.expand(2 * options.batch), n_text)
            conditional, other = join_state(*predicted[:2]).chunk(2)
            guided = other + GUIDANCE * (conditional - other)
            state = scheduler.step(guided, t, state).prev_sample
        return state

    return run


def timed(run: Callable[[], Tensor], device: str) -> dict[str, float]:
    """Run once; return wall-clock seconds and CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    with torch.inference_mode():
        finite = bool(run().isfinite().all())
    if device == "cuda":
        torch.cuda.synchronize()
    if not finite:
        raise SystemExit("a sample is not finite")
    return {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}


def gflop_per_image(options: argparse.Namespace) -> float:
    """Count the FLOPs of all calls for one image, conditional and unconditional."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        network, n = (
            build_backbone("unidiffuser-v1", **MIDDLE, latent_size=options.latent_size),
            torch.ones(1),
        )
        inputs = (
            torch.randn(1, *latent_shape(options)),
            torch.randn(1, 1, 512),
            torch.randn(1, 77, 64),
        )
        network(*inputs, n, n)
    return 2 * options.steps * counter.get_total_flops() / 1e9


def check_same(ours: Any, theirs: Any, options: argparse.Namespace) -> None:
    """Assert that both networks compute the same."""
    place = {"device": options.device, "dtype": DTYPES[options.dtype]}
    shapes = (latent_shape(options), (1, 512), (77, 64))
    inputs = [torch.randn(1, *shape, **place) for shape in shapes]
    times = [torch.tensor([n], device=options.device) for n in (500, 20)]
    with torch.inference_mode():
        first, other = (net(*inputs, *times)[0].float() for net in (ours, theirs))
    if (first - other).abs().max() > 0.1 * other.std():
        raise SystemExit("the two networks differ")


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
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--latent-size", type=int, default=32)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of the weights")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--compile", action="store_true", help="torch.compile both networks")
    options = parser.parse_args()
    if options.device == "cpu":
        # Threads that wait for each other would add CPU time.
        torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    ours, theirs = build_both(options)
    check_same(ours, theirs, options)
    runs = {"d2i": d2i_run(ours, options), "diffusers": diffusers_run(theirs, options)}
    times: dict[str, list[dict[str, float]]] = {name: [] for name in runs}
    for repeat in range(options.repeats):
        for name in runs if repeat % 2 else reversed(list(runs)):
            times[name].append(timed(runs[name], options.device))
        print(f"repeat {repeat + 1}: {[t[-1] for t in times.values()]}", file=sys.stderr)
    pairs = list(zip(times["d2i"], times["diffusers"], strict=True))
    gflop = gflop_per_image(options)
    wall = statistics.median(ours["wall_s"] for ours, _ in pairs)
    figures = {
        "ratio_wall": spread([theirs["wall_s"] / ours["wall_s"] for ours, theirs in pairs]),
        "ratio_cpu": spread([theirs["cpu_s"] / ours["cpu_s"] for ours, theirs in pairs]),
        "seconds_d2i": spread([ours["wall_s"] for ours, _ in pairs]),
        "cpu_seconds_d2i": spread([ours["cpu_s"] for ours, _ in pairs]),
        "gflop_per_picture": round(gflop),
        "gflops": round(gflop * options.batch / wall, 1),
    }
    said = {"benchmark": "sampling", **vars(options), "machine": machine(options)}
    print(json.dumps({**said, **figures}))


if __name__ == "__main__":
    main()
