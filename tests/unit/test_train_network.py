"""The network as training takes it: what the recipe asks of its blocks, under the same keys."""

from __future__ import annotations

import pytest
import torch

from d2i.config import apply_settings
from d2i.recipes import load_recipe
from d2i.train.network import build_trained_network


@pytest.mark.parametrize("is_asked", [False, True])
def test_blocks_are_compiled_and_recomputed_as_asked(is_asked: bool) -> None:
    recipe = load_recipe("demo")
    settings = [f"train.{name}={is_asked}" for name in ("compile", "activation_checkpointing")]
    network = build_trained_network(apply_settings(recipe, [s.lower() for s in settings]))
    plain = build_trained_network(recipe)
    assert network.gradient_checkpointing is is_asked
    blocks = [*network.in_blocks, network.mid_block, *network.out_blocks]
    assert all((block._compiled_call_impl is not None) is is_asked for block in blocks)
    for (name, weight), (key, expected) in zip(
        network.state_dict().items(), plain.state_dict().items(), strict=True
    ):
        assert name == key
        assert torch.equal(weight, expected)
