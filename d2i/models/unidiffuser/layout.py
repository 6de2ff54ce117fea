"""UniDiffuser weights, converted to and from diffusers' layout, as tensors by name.

diffusers' `UniDiffuserModel` has separate q, k and v, and a second patch projection that it never
uses. Imports no diffusers and no network.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

UNUSED_PREFIX = "transformer.pos_embed.proj."
_PATCH_PREFIX = "patch_embed.proj."
_QKV = "attn.qkv.weight"
_SEPARATE = tuple(f"attn1.to_{part}.weight" for part in "qkv")

# Longest names first, so that none hides a longer one.
_OUTSIDE = {
    "pos_embed_token": "data_type_pos_embed_token",
    "token_embedding.": "data_type_token_embedding.",
    "patch_embed.": "vae_img_in.",
    "clip_img_embed.": "clip_img_in.",
    "text_embed.": "text_in.",
    "decoder_pred.": "vae_img_out.",
    "norm.": "transformer.norm_out.",
}
_INSIDE = {
    "attn.proj.": "attn1.to_out.0.",
    "mlp.fc1.": "ff.net.0.proj.",
    "mlp.fc2.": "ff.net.2.",
    "norm2.": "norm1.",
}
_OF_SKIP = {"skip_linear.": "skip.skip_linear.", "norm1.": "skip.norm."}

_BLOCK = re.compile(r"(in_blocks\.\d+|mid_block|out_blocks\.\d+)\.(.+)")
_THEIR_BLOCK = re.compile(
    r"transformer\.transformer_(in_blocks\.\d+|mid_block|out_blocks\.\d+)\.(.+)"
)


def is_diffusers(state: Mapping[str, Tensor]) -> bool:
    """Return whether the keys are those of diffusers' `UniDiffuserModel`."""
    return "vae_img_in.proj.weight" in state


def to_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert published UniDiffuser weights to diffusers' layout; unknown keys stay.

    The unused patch projection becomes a copy of the used one, as diffusers' own converter does.
    """
    renamed: dict[str, Tensor] = {}
    for key, tensor in state.items():
        block = _BLOCK.fullmatch(key)
        if block is None:
            renamed[_replaced(key, _OUTSIDE)] = tensor
        else:
            renamed |= _block_to_diffusers(block[1], block[2], tensor)
        if key.startswith(_PATCH_PREFIX):
            renamed[UNUSED_PREFIX + key.removeprefix(_PATCH_PREFIX)] = tensor.clone()
    return renamed


def from_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert UniDiffuser weights in diffusers' layout to published keys; unknown keys stay.

    The unused patch projection is dropped. If one of q, k, v is missing or has another shape, the
    three are not fused.
    """
    left = {key: tensor for key, tensor in state.items() if not key.startswith(UNUSED_PREFIX)}
    renamed: dict[str, Tensor] = {}
    for key in list(left):
        if key.endswith(_SEPARATE[0]):
            stem = key.removesuffix(_SEPARATE[0])
            parts = [stem + part for part in _SEPARATE]
            shapes = {left[part].shape if part in left else None for part in parts}
            if len(shapes) == 1 and left[key].dim():
                ours = _from_diffusers_key(key).removesuffix(_SEPARATE[0]) + _QKV
                renamed[ours] = torch.cat([left.pop(part) for part in parts])
    return renamed | {_from_diffusers_key(key): tensor for key, tensor in left.items()}


def diffusers_config(network: Any) -> dict[str, Any]:
    """Return the `config.json` from which diffusers builds its model of the same sizes.

    Args:
        network: a `UniDiffuser`.
    """
    return {
        "_class_name": "UniDiffuserModel",
        "text_dim": network.text_dim,
        "clip_img_dim": network.clip_dim,
        "num_text_tokens": network.num_text_tokens,
        "num_attention_heads": network.mid_block.attn.num_heads,
        "attention_head_dim": network.dim // network.mid_block.attn.num_heads,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2 * len(network.in_blocks),
        "sample_size": network.latent_size,
        "patch_size": network.patch_size,
        "activation_fn": "gelu",
        "num_embeds_ada_norm": 1000,
        "norm_type": "layer_norm",
        "block_type": "unidiffuser",
        "pre_layer_norm": False,
        "use_timestep_embedding": False,
        "use_patch_pos_embed": False,
        "ff_final_dropout": True,
        "use_data_type_embedding": network.has_data_type,
    }


def _block_to_diffusers(block: str, name: str, tensor: Tensor) -> dict[str, Tensor]:
    stem = f"transformer.transformer_{block}."
    if block.startswith("out_blocks"):
        in_skip = _replaced(name, _OF_SKIP)
        if in_skip != name:
            return {stem + in_skip: tensor}
        stem += "block."
    if name == _QKV:
        rows = tensor.chunk(3)
        return {stem + part: row.clone() for part, row in zip(_SEPARATE, rows, strict=True)}
    return {stem + _replaced(name, _INSIDE): tensor}


def _from_diffusers_key(key: str) -> str:
    block = _THEIR_BLOCK.fullmatch(key)
    if block is None:
        return _replaced(key, _reversed(_OUTSIDE))
    name = block[2].removeprefix("block.")
    is_of_skip = name == block[2] and block[1].startswith("out_blocks")
    return f"{block[1]}.{_replaced(name, _reversed(_OF_SKIP if is_of_skip else _INSIDE))}"


def _replaced(name: str, beginnings: Mapping[str, str]) -> str:
    """Replace the prefix of a name by the first entry that matches."""
    for old, new in beginnings.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def _reversed(names: Mapping[str, str]) -> dict[str, str]:
    return {new: old for old, new in names.items()}
