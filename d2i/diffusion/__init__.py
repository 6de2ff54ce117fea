"""Noise schedule, samplers, guidance, losses and keyed random draws."""

from d2i.diffusion.dpm_solver import Eps, dpm_solver
from d2i.diffusion.guidance import guided
from d2i.diffusion.losses import noise_prediction_loss, sample_latent
from d2i.diffusion.samplers import ancestral
from d2i.diffusion.schedule import Schedule, default_schedule

__all__ = [
    "Eps",
    "Schedule",
    "ancestral",
    "default_schedule",
    "dpm_solver",
    "guided",
    "noise_prediction_loss",
    "sample_latent",
]
