"""Presets: the published backbones by name, and the overrides of their sizes.

Holds the table of sizes; builds networks, loads no weights.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from d2i.errors import ConfigError
from d2i.models.unidiffuser import UniDiffuser
from d2i.models.uvit import UViT

UVIT_S: dict[str, Any] = {
    "latent_size": 32,
    "patch_size": 2,
    "dim": 512,
    "depth": 12,
    "num_heads": 8,
    "text_dim": 768,
    "num_text_tokens": 77,
    "latent_scale": 0.23010,
    "gradient_checkpointing": False,
}
UNIDIFFUSER_V1: dict[str, Any] = {
    "latent_size": 64,
    "patch_size": 2,
    "dim": 1536,
    "depth": 30,
    "num_heads": 24,
    "text_dim": 64,
    "num_text_tokens": 77,
    "clip_dim": 512,
    "latent_scale": 0.18215,
    "gradient_checkpointing": False,
}
PRESETS: dict[str, tuple[type[nn.Module], dict[str, Any], dict[str, Any]]] = {
    "uvit-s": (UViT, UVIT_S, {}),
    "uvit-s-deep": (UViT, UVIT_S | {"depth": 16}, {}),
    "unidiffuser-v0": (UniDiffuser, UNIDIFFUSER_V1, {"has_data_type": False}),
    "unidiffuser-v1": (UniDiffuser, UNIDIFFUSER_V1, {"has_data_type": True}),
}


def build_backbone(name: str, **overrides: Any) -> nn.Module:
    """Build a published network, freshly initialised, in float32.

    Inside `with torch.device("meta")` no memory is used; `load_weights` then fills the network.

    Args:
        name: `uvit-s`, `uvit-s-deep`, `unidiffuser-v0` or `unidiffuser-v1`.
        **overrides: `latent_size` and `patch_size` (latent pixels), `dim`, `depth`,
            `num_heads`, `text_dim`, `num_text_tokens`, `clip_dim` (UniDiffuser only),
            `latent_scale`, `gradient_checkpointing`.

    Returns:
        The network; its `latent_scale` is the factor from raw VAE latents to its inputs.

    Raises:
        ConfigError: unknown name or override, or sizes that do not fit each other.
    """
    if name not in PRESETS:
        raise ConfigError(_unknown("backbone", name, PRESETS))
    network_class, sizes, fixed = PRESETS[name]
    for override in overrides:
        if override not in sizes:
            raise ConfigError(_unknown(f"override of {name}", override, sizes))
    arguments = sizes | overrides
    _check_sizes(name, arguments)
    return network_class(**arguments, **fixed)


def changed_sizes(name: str, sizes: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the sizes in which a network differs from the published one.

    Args:
        name: The preset.
        sizes: Overrides, as `build_backbone` takes them.

    Returns:
        (network's size, published size) by name; empty if all are the same.
    """
    published = PRESETS[name][1]
    found = {key: (value, published.get(key)) for key, value in sizes.items()}
    return {key: (size, other) for key, (size, other) in found.items() if size != other}


def name_sizes(name: str, sizes: Mapping[str, Any]) -> str:
    """Name a network by its preset and the sizes in which it differs from it.

    Examples: `uvit-s`, `uvit-s-shaped, 3 blocks of width 32`, or `uvit-s with num_text_tokens 154`.
    """
    changed = changed_sizes(name, sizes)
    if changed.keys() & {"depth", "dim"}:
        whole = {**PRESETS[name][1], **sizes}
        return f"{name}-shaped, {whole['depth']} blocks of width {whole['dim']}"
    words = ", ".join(f"{key} {size}" for key, (size, _) in changed.items())
    return f"{name} with {words}" if words else name


def _unknown(what: str, got: str, known: Collection[str]) -> str:
    nearest = difflib.get_close_matches(got, known, n=1, cutoff=0.0)[0]
    return f"unknown {what} {got!r}: expected one of {', '.join(known)}; did you mean {nearest!r}?"


def _check_sizes(name: str, sizes: dict[str, Any]) -> None:
    counts = [key for key in sizes if key not in ("latent_scale", "gradient_checkpointing")]
    for key in counts:
        if not isinstance(sizes[key], int) or isinstance(sizes[key], bool) or sizes[key] < 1:
            raise ConfigError(f"{name}: {key} is {sizes[key]!r}, expected a whole number above 0")
    for whole, part in (("latent_size", "patch_size"), ("dim", "num_heads")):
        if sizes[whole] % sizes[part]:
            raise ConfigError(
                f"{name}: {whole} {sizes[whole]} is not a multiple of {part} {sizes[part]}; "
                "change one of them"
            )
    if sizes["dim"] % 2:
        raise ConfigError(f"{name}: dim {sizes['dim']} is odd, expected an even number")
