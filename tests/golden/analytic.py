"""The two analytic noise predictions of the golden sampler files, defined in `sampler.json`."""

import numpy as np
import torch
from torch import Tensor

from d2i.diffusion.dpm_solver import Eps
from tests.golden.arrays import tensors


def analytic_eps(name: str) -> Eps:
    """`gmm` (exact for a Gaussian mixture) or `linear`; evaluated in float64."""
    return {"gmm": _gmm, "linear": _linear}[name]


def _signal_and_noise(n: Tensor) -> tuple[Tensor, Tensor]:
    log_abar = np.log(tensors("schedule")["cum_alphas"][1:].numpy())
    abar = np.exp(np.interp(n.double().numpy(), np.arange(1, 1001), log_abar))
    signal, noise = np.sqrt(abar), np.sqrt(1.0 - abar)
    return torch.from_numpy(signal)[:, None], torch.from_numpy(noise)[:, None]


def _linear(x: Tensor, n: Tensor) -> Tensor:
    constants = tensors("ancestral")
    _, s_B1 = _signal_and_noise(n)
    eps = s_B1 * (x.double().flatten(1) @ constants["lin_M"].T)
    return (eps + n.double()[:, None] / 1000 * constants["lin_b"]).view_as(x).to(x.dtype)


def _gmm(x: Tensor, n: Tensor) -> Tensor:
    constants = tensors("ancestral")
    means_KD, stds_K = constants["gmm_means"], constants["gmm_stds"]
    a_B1, s_B1 = _signal_and_noise(n)
    v_BK = a_B1**2 * stds_K**2 + s_B1**2
    distance_BKD = x.double().flatten(1)[:, None] - a_B1[:, None] * means_KD
    dim = means_KD.shape[1]
    logits_BK = (
        constants["gmm_weights"].log()
        - dim / 2 * v_BK.log()
        - distance_BKD.square().sum(-1) / (2 * v_BK)
    )
    weights_BK1 = (logits_BK.softmax(1) / v_BK)[:, :, None]
    return (s_B1 * (weights_BK1 * distance_BKD).sum(1)).view_as(x).to(x.dtype)
