"""The golden directory: stored arrays, the tiny networks, the seeded weights recipe."""

import json
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from d2i.models import build_backbone, load_weights
from tests.shared import SHARED

GOLDEN = SHARED / "golden"
TINY = {"latent_size": 8, "patch_size": 2, "dim": 64, "depth": 4, "num_heads": 4}
TINY_UVIT = TINY | {"text_dim": 32, "num_text_tokens": 7}
TINY_UNIDIFFUSER = TINY | {"text_dim": 16, "num_text_tokens": 7, "clip_dim": 24}
NORM_NAMES = {"norm", "norm1", "norm2", "norm3", "norm_out"}
EMBEDDING_KEYS = {"pos_embed", "pos_embed_token", "token_embedding.weight"}


@cache
def tensors(name: str) -> dict[str, Tensor]:
    """The arrays of `NAME.npz` as tensors; read only."""
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as stored:
        return {key: torch.from_numpy(np.asarray(stored[key])) for key in stored.files}


def facts(name: str) -> Any:
    """The content of `NAME.json`."""
    return json.loads((GOLDEN / f"{name}.json").read_text())


def tiny_uvit() -> nn.Module:
    """The tiny U-ViT with its golden weights."""
    network = build_backbone("uvit-s", **TINY_UVIT)
    return load_weights(network, GOLDEN / "uvit_tiny.safetensors")


def tiny_unidiffuser(version: str) -> nn.Module:
    """The tiny UniDiffuser `v0` or `v1` with its golden weights."""
    network = build_backbone(f"unidiffuser-{version}", **TINY_UNIDIFFUSER)
    return load_weights(network, GOLDEN / f"unidiffuser_{version}_tiny.safetensors")


def fill_by_recipe(network: nn.Module, seed: int) -> nn.Module:
    """Give every tensor its value by the recipe of `full_size.json`."""
    state = network.state_dict()
    for index, key in enumerate(sorted(state)):
        state[key].copy_(
            torch.from_numpy(_recipe_values(key, tuple(state[key].shape), seed, index))
        )
    return network


def recipe_input(seed: int, index: int, shape: tuple[int, ...]) -> Tensor:
    """Input number `index` by the recipe of `full_size.json`."""
    return torch.from_numpy(_normal(seed, 100_000 + index, shape))


def max_distance(found: Tensor, expected: Tensor) -> float:
    """Largest absolute difference; shapes must be equal."""
    assert found.shape == expected.shape
    return float((found.detach() - expected).abs().max())


def _recipe_values(
    key: str, shape: tuple[int, ...], seed: int, index: int
) -> npt.NDArray[np.float32]:
    values = _normal(seed, index, shape)
    if key.endswith(".weight") and key.split(".")[-2] in NORM_NAMES:
        return np.float32(1.0) + np.float32(0.1) * values
    if key in EMBEDDING_KEYS:
        return np.float32(0.5) * values
    if len(shape) == 1:
        return np.float32(0.1) * values
    return values / np.float32(np.sqrt(np.prod(shape[1:])))


def _normal(seed: int, index: int, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    return np.random.default_rng([seed, index]).standard_normal(shape).astype(np.float32)
