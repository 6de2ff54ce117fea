"""The settings that are proposed make a training fit, and no needless one is among them."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from d2i.config import Recipe, apply_settings
from d2i.recipes import resolve_recipe
from d2i.train.memory import Memory, MemoryReckoner, device_memory, memory_problem
from tests.integration.training import SETTINGS

GB = 10**9
MEMORY = Memory(
    weights=4 * GB,
    masters=GB,
    gradients=GB,
    buckets=GB,
    moments=2 * GB,
    ema=2 * GB,
    text_encoder=0,
    activations=3 * GB,
    activations_per_sample=GB,
    recomputed=GB,
    optimizer_step=4 * GB,
)


@cache
def reckoner() -> MemoryReckoner:
    return MemoryReckoner(2, "cpu", {"stage": 1, "reduce_bucket_size": 1000})


@cache
def by_stage() -> MemoryReckoner:
    return MemoryReckoner(2, "cpu")


@cache
def recipe() -> Recipe:
    given = [f"{name}={value}" for name, value in SETTINGS.items()]
    return resolve_recipe("demo", [*given, "train.micro_batch_size=4"])


def test_total_is_the_larger_of_backward_pass_and_step() -> None:
    assert MEMORY.total == (4 + 1 + 1 + 2 + 2 + max(1 + 3 + 1, 4)) * GB


def test_line_has_what_was_got_and_expected_and_next_step() -> None:
    assert memory_problem(MEMORY, 15 * GB, None) is None
    assert memory_problem(MEMORY, 14 * GB, ("train.zero_stage=2", "adapter.kind=lora")) == (
        "memory: got 15.00 GB a rank: weights 4.00, masters 1.00, gradients 1.00, buckets 1.00, "
        "moments 2.00, ema 2.00, activations 3.00 (1.00 a sample), recomputed 1.00, "
        "optimizer step 4.00; "
        "expected at most 14.00 GB; use --set train.zero_stage=2 --set adapter.kind=lora"
    )
    assert "no setting makes it fit" in str(memory_problem(MEMORY, GB, None))


@settings(max_examples=25, deadline=None)
@given(share=st.floats(0.05, 0.999))
def test_proposed_settings_fit_and_none_is_needless(share: float) -> None:
    num_bytes = int(reckoner().reckon(recipe()).total * share)
    found = reckoner().settings_that_fit(recipe(), num_bytes)
    if found is None:
        # Not even what takes least fits.
        least = [
            "train.activation_checkpointing=true",
            "train.micro_batch_size=1",
            "train.short_ema_length=null",
        ]
        assert reckoner().reckon(apply_settings(recipe(), least)).total > num_bytes
        return
    assert reckoner().reckon(apply_settings(recipe(), found)).total <= num_bytes
    for setting in found:
        fewer = [other for other in found if other != setting]
        assert reckoner().reckon(apply_settings(recipe(), fewer)).total > num_bytes


def test_settings_that_change_no_result_are_proposed_first() -> None:
    total = by_stage().reckon(recipe()).total
    assert by_stage().settings_that_fit(recipe(), total - 1) == (
        "train.activation_checkpointing=true",
    )
    checkpointed = apply_settings(recipe(), ["train.activation_checkpointing=true"])
    total = by_stage().reckon(checkpointed).total
    assert by_stage().settings_that_fit(checkpointed, total - 1) == ("train.micro_batch_size=2",)


def test_zero_stage_3_takes_least_of_large_network() -> None:
    """More of it than DeepSpeed gathers at once, so that only partitions are left."""
    stages = {
        stage: {"stage": stage, "reduce_bucket_size": 1, "stage3_param_persistence_threshold": 0}
        for stage in range(4)
    }
    stages[3]["stage3_max_live_parameters"] = 1
    found = {
        stage: MemoryReckoner(8, "cpu", zero).reckon(recipe()) for stage, zero in stages.items()
    }
    assert found[3].total < found[2].total < found[1].total
    assert found[0].ema == pytest.approx(8 * found[3].ema, rel=0.01)


def test_optimizer_on_cpu_takes_nothing_of_gpu() -> None:
    zero = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    found = MemoryReckoner(2, "cuda", zero).reckon(recipe())
    assert (found.masters, found.moments, found.ema, found.gradients) == (0, 0, 0, 0)
    assert MemoryReckoner(2, "cpu", zero).reckon(recipe()).moments > 0


def test_ranks_share_memory_of_processor() -> None:
    whole = device_memory(torch.device("cpu"), 1)
    assert whole > GB
    assert device_memory(torch.device("cpu"), 4) == whole // 4
