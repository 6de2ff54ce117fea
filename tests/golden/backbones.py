"""The tiny networks of `golden/backbones`: weights by name, inputs, conditions."""

from __future__ import annotations

import hashlib
import zlib
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tests.golden.arrays import facts, tensors


def golden_network(family: str) -> Any:
    """Build the tiny network of a family with its golden weights and scheduler."""
    import diffusers

    found = facts(f"backbones/{family}")
    network: Any = getattr(diffusers, found["network"]).from_config(found["config"])
    fill_by_name(network, found["seed"])
    assert weights_sha256(network) == found["weights_sha256"]
    network.latent_size = tensors(f"backbones/{family}")["in.start"].shape[-1]
    # Of the tiny configuration's autoencoder.
    network.downsampling = 2
    network.scheduler = getattr(diffusers, found["scheduler"]).from_config(
        found["scheduler_config"]
    )
    return network


def fill_by_name(network: nn.Module, seed: int, part: str = "") -> None:
    """Fill the parameters whose names contain a part, by their names and a seed, in float32."""
    for name, parameter in network.named_parameters():
        if part not in name:
            continue
        state = np.random.RandomState((zlib.crc32(name.encode()) ^ seed) & 0x7FFFFFFF)
        values = state.standard_normal(tuple(parameter.shape)).astype(np.float32)
        values *= np.float32(0.05)
        if parameter.dim() == 1 and "norm" in name and name.endswith("weight"):
            values += 1
        parameter.data.copy_(torch.from_numpy(values))


def weights_sha256(network: nn.Module) -> str:
    """Return the sha256 of the weights, as the golden files define it."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.float().numpy().tobytes())
    return digest.hexdigest()


def golden_conditions(family: str) -> dict[str, Tensor]:
    """Return the conditions of the golden samples, by d2i's names."""
    golden = tensors(f"backbones/{family}")
    names = ("text", "mask", "pooled", "time_ids")
    return {name: golden[f"in.{name}"] for name in names if f"in.{name}" in golden}


def golden_draw(family: str) -> Tensor:
    """Return the golden noise levels, as the family's `losses` take them."""
    golden = tensors(f"backbones/{family}")
    return golden["in.n"] if "in.n" in golden else golden["in.u"]
