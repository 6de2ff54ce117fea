"""Noise schedule, samplers, guidance, losses and keyed random draws."""

from d2i.diffusion.dpm_solver import Eps, dpm_solver
from d2i.diffusion.guidance import guided_unidiffuser, guided_uvit, join_state, split_state
from d2i.diffusion.losses import sample_latent, unidiffuser_loss, uvit_loss
from d2i.diffusion.samplers import ancestral
from d2i.diffusion.schedule import Schedule, default_schedule

__all__ = [
    "Eps",
    "Schedule",
    "ancestral",
    "default_schedule",
    "dpm_solver",
    "guided_unidiffuser",
    "guided_uvit",
    "join_state",
    "sample_latent",
    "split_state",
    "unidiffuser_loss",
    "uvit_loss",
]
