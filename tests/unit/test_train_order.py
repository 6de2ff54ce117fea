"""The data order is a function of seed and step: no rank, restart or grouping changes it."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from d2i.train.ema import Ema
from d2i.train.order import DataOrder


@given(st.integers(1, 50), st.integers(0, 5), st.integers(1, 20))
def test_every_sample_once_an_epoch(num_samples: int, seed: int, size: int) -> None:
    order = DataOrder(num_samples, seed)
    num_steps = -(-3 * num_samples // size)
    stream = np.concatenate([order.global_batch(step, size) for step in range(num_steps)])
    for epoch in range(3):
        part = stream[epoch * num_samples : (epoch + 1) * num_samples]
        assert sorted(part) == list(range(num_samples))


@given(st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2]), st.integers(0, 30))
def test_ranks_share_one_global_batch(world_size: int, num_micro: int, step: int) -> None:
    order = DataOrder(37, 3)
    parts = [
        order.micro_batches(step, 16, rank, world_size, num_micro) for rank in range(world_size)
    ]
    together = np.concatenate([batch for rank in parts for batch in rank])
    assert (together == order.global_batch(step, 16)).all()
    assert {len(batch) for rank in parts for batch in rank} == {16 // world_size // num_micro}


def test_the_average_follows_its_formula_and_gives_the_weights_back() -> None:
    weight = torch.tensor([1.0, 2.0])
    ema = Ema([weight], rate=0.9)
    weight.copy_(torch.tensor([3.0, 4.0]))
    ema.update()
    expected = 0.9 * torch.tensor([1.0, 2.0]) + 0.1 * torch.tensor([3.0, 4.0])
    read = ema.read_in_place(lambda: {"w": weight.clone()})
    assert torch.allclose(read["w"], expected)
    assert (weight == torch.tensor([3.0, 4.0])).all()
