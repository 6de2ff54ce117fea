"""The data order depends on seed and step alone, not on ranks, resume or micro batches."""

from __future__ import annotations

import tracemalloc
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from d2i.train.checkpoint.ema import Ema
from d2i.train.data.data_order import DataOrder

Kind = Literal["global", "blocked"]
kinds = st.sampled_from(["global", "blocked"])
shard_sizes = st.lists(st.integers(0, 12), min_size=1, max_size=6).filter(any).map(tuple)


@given(shard_sizes, kinds, st.integers(1, 4), st.integers(0, 5), st.integers(1, 20))
def test_data_order_has_every_sample_once_per_epoch(
    sizes: tuple[int, ...], kind: Kind, window: int, seed: int, size: int
) -> None:
    order = DataOrder(sizes, seed, kind, window)
    num_samples = sum(sizes)
    num_steps = -(-3 * num_samples // size)
    stream = np.concatenate([order.global_batch(step, size) for step in range(num_steps)])
    for epoch in range(3):
        part = stream[epoch * num_samples : (epoch + 1) * num_samples]
        assert sorted(part) == list(range(num_samples))


@given(kinds, st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2]), st.integers(0, 30))
def test_micro_batches_of_ranks_form_global_batch(
    kind: Kind, world_size: int, num_micro: int, step: int
) -> None:
    order = DataOrder((20, 17), 3, kind)
    parts = [
        order.micro_batches(step, 16, rank, world_size, num_micro) for rank in range(world_size)
    ]
    together = np.concatenate([batch for rank in parts for batch in rank])
    assert (together == order.global_batch(step, 16)).all()
    assert {len(batch) for rank in parts for batch in rank} == {16 // world_size // num_micro}


def test_blocked_order_shuffles_within_window_of_shards() -> None:
    order = DataOrder((10,) * 8, 0, "blocked", num_window_shards=2)
    shards = order.epoch(0) // 10
    windows = [set(part) for part in np.split(shards, 4)]
    assert [len(window) for window in windows] == [2, 2, 2, 2]
    assert set.union(*windows) == set(range(8))
    assert (order.epoch(0) != order.epoch(1)).any()
    # Within a window the samples are mixed, not one shard after the other.
    assert (np.diff(shards[:20]) != 0).sum() > 2


@given(shard_sizes, st.integers(1, 4), st.integers(1, 20), st.integers(0, 12))
def test_shards_ahead_cover_step_and_next_window(
    sizes: tuple[int, ...], window: int, size: int, step: int
) -> None:
    order = DataOrder(sizes, 5, "blocked", window)
    ends = np.cumsum(sizes)
    ahead = order.shards_ahead(step, size)
    read = np.searchsorted(ends, order.global_batch(step, size), side="right")
    assert set(read.tolist()) <= set(ahead)
    assert read[0] in ahead[:window]
    # Also the shards of the next window, of this epoch or the next.
    after = order.global_batch((step + 1) * size, 1)
    assert set(np.searchsorted(ends, after, side="right").tolist()) <= set(ahead)
    assert set(DataOrder(sizes, 5).shards_ahead(step, size)) == set(range(len(sizes)))


def test_backward_compatibility_keeps_data_order_for_resume() -> None:
    """A resumed run keeps the order that it began with, whatever changes in this code."""
    order = DataOrder((3, 2, 4, 3), 7, "blocked", num_window_shards=2)
    assert order.epoch(1).tolist() == [1, 3, 0, 4, 2, 10, 7, 5, 9, 11, 6, 8]
    for num_samples, epoch in ((12, 1), (5000, 0)):
        random = np.random.default_rng([7, epoch, num_samples])
        assert (DataOrder((num_samples,), 7).epoch(epoch) == random.permutation(num_samples)).all()


@pytest.mark.parametrize("kind", ["global", "blocked"])
def test_data_order_uses_few_bytes_per_sample(kind: Kind) -> None:
    num_samples = 10**6
    order = DataOrder((1000,) * (num_samples // 1000), 1, kind, num_window_shards=8)
    tracemalloc.start()
    try:
        for step in (0, num_samples // 64, 0):
            order.global_batch(step, 64)
        current, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert current < 5 * num_samples
    assert peak < 10 * num_samples


def test_ema_update_matches_formula() -> None:
    weight = torch.tensor([1.0, 2.0])
    ema = Ema([weight], rate=0.9)
    weight.copy_(torch.tensor([3.0, 4.0]))
    ema.update()
    expected = 0.9 * torch.tensor([1.0, 2.0]) + 0.1 * torch.tensor([3.0, 4.0])
    assert torch.allclose(ema.tensors[0], expected)
