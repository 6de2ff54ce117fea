"""EMA of the weights: diffusers' warm-up, and EDM2's power function of any length."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers.training_utils import EMAModel
from numpy.typing import NDArray

from d2i.train.checkpoint.ema import Decay, Ema, power_decay, warmup_decay

NUM_STEPS = 3000


def shares(decay: Decay) -> NDArray[np.float64]:
    """Return each step's share of the average, the share of the initial weights first."""
    found = np.ones(1)
    for step in range(1, NUM_STEPS + 1):
        found = np.append(found * decay(step), 1 - decay(step))
    return found


@pytest.mark.parametrize("rate", [0.9999, 0.98, 0.5, 0])
def test_ema_warmup_matches_diffusers(rate: float) -> None:
    weight = torch.nn.Parameter(torch.zeros(1000))
    theirs = EMAModel([weight], decay=rate)
    ours = Ema([weight], warmup_decay(rate))
    random = torch.Generator().manual_seed(0)
    for step in range(1, 400):
        assert warmup_decay(rate)(step) == theirs.get_decay(step)
        with torch.no_grad():
            weight += torch.randn(1000, generator=random)
        theirs.step([weight])
        ours.update()
        torch.testing.assert_close(ours.tensors[0], theirs.shadow_params[0], rtol=1e-5, atol=1e-5)
    assert theirs.get_decay(100_000) == warmup_decay(rate)(100_000) == rate


def test_ema_first_step_replaces_initial_weights() -> None:
    assert [warmup_decay(0.9999)(step) for step in (1, 2, 3)] == [0, 2 / 11, 3 / 12]
    for decay in (warmup_decay(0.9999), power_decay(0.05)):
        assert shares(decay)[0] == 0
    # A constant decay of 0.9999 keeps a share of them.
    assert shares(lambda _: 0.9999)[0] == pytest.approx(0.9999**NUM_STEPS)


@pytest.mark.parametrize(
    ("decay", "length"),
    [
        (power_decay(0.05), 0.05),
        (power_decay(0.10), 0.10),
        # Gamma 8: 3 / (10 sqrt(11)).
        (warmup_decay(0.9999), 0.0905),
    ],
)
def test_ema_decay_has_nominal_length(decay: Decay, length: float) -> None:
    found = shares(decay)
    times = np.arange(NUM_STEPS + 1) / NUM_STEPS
    mean = (found * times).sum()
    assert found.sum() == pytest.approx(1)
    assert np.sqrt((found * (times - mean) ** 2).sum()) == pytest.approx(length, rel=0.005)


def test_ema_resumes_from_its_state() -> None:
    weight = torch.tensor([1.0])
    whole, half = Ema([weight], power_decay(0.05)), Ema([weight], power_decay(0.05))
    for step in range(1, 7):
        weight += step
        whole.update()
        if step == 3:
            half.tensors, half.num_updates = [whole.tensors[0].clone()], step
        elif step > 3:
            half.update()
    assert torch.equal(half.tensors[0], whole.tensors[0])
