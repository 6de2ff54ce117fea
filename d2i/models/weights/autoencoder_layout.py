"""KL autoencoder weights, converted between LDM's layout (`autoencoder_kl.pth`) and diffusers'.

Renames keys and reshapes 1x1 kernels only. Imports no diffusers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

# Stable Diffusion's factor; d2i itself takes the scale from the backbone.
_SCALING_FACTOR = 0.18215
_NORM_GROUPS = 32
# Axes of a convolution kernel.
_NUM_AXES = 4

# Pairs of (LDM, diffusers) names; the number at `{}` is kept. The two layouts count the levels of
# decoder.up in opposite directions, so `_renumbered` reverses those.
_NAMES = (
    (r"down.{}.block.{}", r"down_blocks.{}.resnets.{}"),
    (r"down.{}.downsample", r"down_blocks.{}.downsamplers.0"),
    (r"up.{}.block.{}", r"up_blocks.{}.resnets.{}"),
    (r"up.{}.upsample", r"up_blocks.{}.upsamplers.0"),
    (r"mid.block_1", r"mid_block.resnets.0"),
    (r"mid.block_2", r"mid_block.resnets.1"),
    (r"mid.attn_1.norm", r"mid_block.attentions.0.group_norm"),
    (r"mid.attn_1.q", r"mid_block.attentions.0.to_q"),
    (r"mid.attn_1.k", r"mid_block.attentions.0.to_k"),
    (r"mid.attn_1.v", r"mid_block.attentions.0.to_v"),
    (r"mid.attn_1.proj_out", r"mid_block.attentions.0.to_out.0"),
    (r"norm_out", r"conv_norm_out"),
)
# diffusers' attention names before 2023, which older files still use.
_OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_OLD_ATTENTION = re.compile(r"(.*mid_block\.attentions\.0\.)(query|key|value|proj_attn)(\..*)")
_LDM_SHORTCUT, _SHORTCUT = "nin_shortcut", "conv_shortcut"
_ATTENTION = re.compile(r".*mid_block\.attentions\.0\.to_(q|k|v|out\.0)\.weight")


def is_ldm(names: Mapping[str, Any]) -> bool:
    """Return whether the keys are those of an autoencoder in LDM's layout."""
    return "encoder.down.0.block.0.conv1.weight" in names


def is_diffusers_autoencoder(names: Mapping[str, Any]) -> bool:
    """Return whether the keys are those of diffusers' `AutoencoderKL`."""
    return "encoder.down_blocks.0.resnets.0.conv1.weight" in names


def ldm_to_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert an autoencoder to diffusers' layout; 1x1 attention kernels become matrices."""
    num_levels = _count(state, r"encoder\.down\.(\d+)\..*")
    renamed = {}
    for key, tensor in state.items():
        name = _renamed(key, _NAMES).replace(_LDM_SHORTCUT, _SHORTCUT)
        name = _renumbered(name, num_levels)
        is_kernel = _ATTENTION.fullmatch(name) and tensor.shape[2:] == (1, 1)
        renamed[name] = tensor[:, :, 0, 0] if is_kernel else tensor
    return renamed


def diffusers_to_ldm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert an autoencoder to LDM's layout; attention matrices become 1x1 kernels."""
    num_levels = _count(state, r"encoder\.down_blocks\.(\d+)\..*")
    renamed = {}
    for key, tensor in state.items():
        name = _renamed(_renumbered(key, num_levels), [(new, old) for old, new in _NAMES])
        name = name.replace(_SHORTCUT, _LDM_SHORTCUT)
        renamed[name] = tensor[:, :, None, None] if _ATTENTION.fullmatch(key) else tensor
    return renamed


def with_new_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename pre-2023 attention keys in diffusers' layout to the current names."""
    return {_OLD_ATTENTION.sub(_new_name, key): tensor for key, tensor in state.items()}


def _new_name(match: re.Match[str]) -> str:
    return f"{match[1]}{_OLD_NAMES[match[2]]}{match[3]}"


def autoencoder_config(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the `config.json` from which diffusers builds the autoencoder of these weights.

    Args:
        state: in diffusers' layout.

    Raises:
        KeyError: If a convolution that determines a size is missing, or is not 4-dimensional.
    """
    num_levels = _count(state, r"encoder\.down_blocks\.(\d+)\..*")
    widths = [
        _size(state, f"encoder.down_blocks.{level}.resnets.0.conv1.weight", 0)
        for level in range(num_levels)
    ]
    return {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": widths,
        "down_block_types": ["DownEncoderBlock2D"] * num_levels,
        "up_block_types": ["UpDecoderBlock2D"] * num_levels,
        "layers_per_block": _count(state, r"encoder\.down_blocks\.0\.resnets\.(\d+)\..*"),
        "in_channels": _size(state, "encoder.conv_in.weight", 1),
        "out_channels": _size(state, "decoder.conv_out.weight", 0),
        "latent_channels": _size(state, "post_quant_conv.weight", 0),
        "norm_num_groups": _NORM_GROUPS,
        "sample_size": 256,
        "scaling_factor": _SCALING_FACTOR,
    }


def _size(state: Mapping[str, Tensor], key: str, axis: int) -> int:
    if state[key].dim() != _NUM_AXES:
        raise KeyError(key)
    return state[key].shape[axis]


def _count(state: Mapping[str, Any], pattern: str) -> int:
    """Return one more than the highest number that the pattern captures; 0 if it captures none."""
    numbers = [int(match[1]) for key in state if (match := re.fullmatch(pattern, key))]
    return max(numbers, default=-1) + 1


def _renamed(key: str, names: Sequence[tuple[str, str]]) -> str:
    half, dot, rest = key.partition(".")
    for old, new in names:
        pattern = re.escape(old).replace(r"\{\}", r"(\d+)") + r"(\..*)"
        if dot and (match := re.fullmatch(pattern, rest)):
            *numbers, tail = match.groups()
            return f"{half}.{new.format(*numbers)}{tail}"
    return key


def _renumbered(key: str, num_levels: int) -> str:
    """Reverse the level number in a decoder key: LDM and diffusers count in opposite directions."""
    match = re.fullmatch(r"decoder\.up_blocks\.(\d+)\.(.*)", key)
    return f"decoder.up_blocks.{num_levels - 1 - int(match[1])}.{match[2]}" if match else key
