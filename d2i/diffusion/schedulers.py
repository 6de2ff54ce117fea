"""diffusers' schedulers as samplers, on d2i's noise schedule and model time.

diffusers counts t = 0..999 where the published networks count n = 1..1000. Both have the same
noise at n = t + 1, so that is the time passed to the network. Knows no network.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from d2i.config import NUM_NOISE_LEVELS
from d2i.diffusion.dpm_solver import Eps, OnStep, time_batch
from d2i.diffusion.schedule import BETA_FIRST, BETA_LAST
from d2i.errors import ConfigError

# diffusers' `scaled_linear` is the schedule of the published networks, to 1e-6 relative.
_SETTINGS: dict[str, Any] = {
    "num_train_timesteps": NUM_NOISE_LEVELS,
    "beta_start": BETA_FIRST,
    "beta_end": BETA_LAST,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    # Samples start at n = 1000, so the first step must too.
    "timestep_spacing": "linspace",
    "clip_sample": False,
}
# The settings closest to the published solver (docs/models.md, Sampling).
_NEAREST = {
    "DPMSolverSinglestepScheduler": {
        "solver_order": 3,
        "algorithm_type": "dpmsolver++",
        "solver_type": "midpoint",
        "final_sigmas_type": "sigma_min",
        "lower_order_final": True,
    }
}


def build_scheduler(name: str) -> Any:
    """Build one of diffusers' schedulers for the noise schedule of the published networks.

    Other options keep diffusers' defaults, except two that would change where a sample starts or
    ends: steps run from the first to the last time, and nothing is clipped.

    Args:
        name: its class, such as `DPMSolverMultistepScheduler`.

    Raises:
        ConfigError: No such class, or it does not support noise prediction or the schedule.
    """
    import diffusers

    scheduler_class: Any = getattr(diffusers, name, None)
    is_scheduler = isinstance(scheduler_class, type) and hasattr(scheduler_class, "set_timesteps")
    taken = set(inspect.signature(scheduler_class).parameters) if is_scheduler else set()
    if not {"beta_schedule", "prediction_type"} <= taken:
        raise ConfigError(
            f"diffusers:{name}: diffusers has no such scheduler for networks that predict noise; "
            "expected one such as diffusers:DPMSolverMultistepScheduler or diffusers:DDIMScheduler"
        )
    settings = _SETTINGS | _NEAREST.get(name, {})
    try:
        return scheduler_class(**{key: value for key, value in settings.items() if key in taken})
    except (ValueError, NotImplementedError, ImportError) as error:
        raise ConfigError(
            f"diffusers:{name}: {error}; expected one that runs on the schedule of Stable "
            "Diffusion, such as diffusers:DPMSolverMultistepScheduler"
        ) from error


def with_numbers_of(scheduler: Any, sampler: str) -> Any:
    """Return a fresh scheduler with the numbers of another: sampling replaces its tables.

    Args:
        scheduler: as a pipeline's files describe it.
        sampler: `diffusers:` and a class, or `pipeline` for the scheduler's own class.

    Raises:
        ConfigError: as `build_scheduler`.
    """
    import diffusers

    prefix, _, name = sampler.partition(":")
    if prefix != "diffusers":
        return type(scheduler).from_config(scheduler.config)
    build_scheduler(name)
    kind: Any = getattr(diffusers, name)
    return kind.from_config(scheduler.config)


def step_arguments(
    on_step: OnStep | None, num_images: int | None = None, sides: Sequence[int] | None = None
) -> dict[str, Any]:
    """Return the arguments with which a pipeline's call tells of each step.

    Args:
        on_step: called with the number of a step, from 1, and the pipeline's state after it: noised
            latents (B, C, h, w) at the pipeline's own scale; None for no argument.
        num_images: images in the batch, of which the others are padding; None for all.
        sides: height and width, for pipelines that keep latents as rows, (B, h w, C).
    """
    if on_step is None:
        return {}

    def at_end(_: Any, index: int, time: Any, tensors: dict[str, Tensor]) -> dict[str, Any]:
        del time
        latents = tensors["latents"][:num_images]
        if latents.dim() == 3 and sides:
            latents = latents.transpose(1, 2).unflatten(2, tuple(sides))
        on_step(index + 1, latents)
        return {}

    return {"callback_on_step_end": at_end}


def run_scheduler(
    eps: Eps, x: Tensor, num_steps: int, name: str, seeds: Sequence[int] | None = None
) -> Tensor:
    """Sample with one of diffusers' schedulers.

    Args:
        eps: noise prediction `eps(x, n)`, as for `dpm_solver`.
        x: (B, ...) standard normal noise, the state at n = 1000.
        num_steps: the scheduler's steps; some schedulers call the network more than once per step.
        name: as for `build_scheduler`.
        seeds: one for each sample, for the noise that some schedulers add at every step; None for
            those that add none.

    Returns:
        Samples shaped and typed as `x`.

    Raises:
        ConfigError: as `build_scheduler`, or the scheduler rejects `num_steps`.
    """
    scheduler = build_scheduler(name)
    try:
        scheduler.set_timesteps(num_steps, device=x.device)
    except ValueError as error:
        raise ConfigError(
            f"num_steps is {num_steps}: {error}; expected a number that {name} accepts; "
            "change it with --set sample.num_steps=N"
        ) from error
    options: dict[str, Any] = {"return_dict": False}
    if seeds is not None and "generator" in inspect.signature(scheduler.step).parameters:
        options["generator"] = [torch.Generator().manual_seed(seed) for seed in seeds]
    state = x * float(scheduler.init_noise_sigma)
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(state, t).to(x.dtype)
        predicted = eps(scaled, time_batch(x, float(t) + 1.0))
        state = scheduler.step(predicted, t, state, **options)[0]
    return state.to(x.dtype)
