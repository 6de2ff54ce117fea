"""The families by name, and networks of the published backbones, built by name and sizes.

Loads no weights. The names themselves are in `d2i.backbones`, which needs no torch.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from d2i.backbones import FAMILIES, family_of, presets_of, unknown
from d2i.errors import ConfigError
from d2i.models.base import Architecture, Family, Layout


def family(name: str) -> Family:
    """Return a family by its name; `_` is taken for `-`.

    Raises:
        ConfigError: If there is no such family.
    """
    key = name.replace("_", "-")
    if key not in FAMILIES:
        raise ConfigError(unknown("family", name, FAMILIES))
    found: Family = importlib.import_module(f"{FAMILIES[key]}.family").FAMILY
    return found


def family_of_backbone(backbone: str) -> Family:
    """Return the family of a backbone.

    Raises:
        ConfigError: If there is no such backbone.
    """
    return family(family_of(backbone))


def all_families() -> Iterator[Family]:
    """Yield every family, in the order of their lines."""
    return map(family, FAMILIES)


def detect_architecture(state: Mapping[str, Tensor]) -> Architecture | None:
    """Return the network that tensors with published names belong to; None if there is none."""
    return next(filter(None, (one.detect(state) for one in all_families())), None)


def detect_layout(state: Mapping[str, Tensor]) -> tuple[str, Layout] | None:
    """Return the layout, other than the published one, that tensors are in; None if there is none.

    Returns:
        The name of the layout, such as `diffusers`, and its functions.
    """
    layouts = (item for one in all_families() for item in one.layouts.items())
    return next(((name, layout) for name, layout in layouts if layout.matches(state)), None)


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
    sizes = presets_of(name).sizes[name]
    for override in overrides:
        if override not in sizes:
            raise ConfigError(unknown(f"override of {name}", override, sizes))
    arguments = {**sizes, **overrides}
    _check_sizes(name, arguments)
    return family_of_backbone(name).build(name, arguments)


def changed_sizes(name: str, sizes: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the sizes in which a network differs from the published one.

    Args:
        name: The preset.
        sizes: Overrides, as `build_backbone` takes them.

    Returns:
        (network's size, published size) by name; empty if all are the same.
    """
    published = presets_of(name).sizes[name]
    found = {key: (value, published.get(key)) for key, value in sizes.items()}
    return {key: (size, other) for key, (size, other) in found.items() if size != other}


def name_sizes(name: str, sizes: Mapping[str, Any]) -> str:
    """Name a network by its preset and the sizes in which it differs from it.

    Examples: `uvit-s`, `uvit-s-shaped, 3 blocks of width 32`, or `uvit-s with num_text_tokens 154`.
    """
    changed = changed_sizes(name, sizes)
    whole = {**presets_of(name).sizes[name], **sizes}
    if changed.keys() & {"depth", "dim"} and {"depth", "dim"} <= whole.keys():
        return f"{name}-shaped, {whole['depth']} blocks of width {whole['dim']}"
    words = ", ".join(f"{key} {size}" for key, (size, _) in changed.items())
    return f"{name} with {words}" if words else name


def _check_sizes(name: str, sizes: Mapping[str, Any]) -> None:
    counts = [key for key in sizes if key not in ("latent_scale", "gradient_checkpointing")]
    for key in counts:
        if not isinstance(sizes[key], int) or isinstance(sizes[key], bool) or sizes[key] < 1:
            raise ConfigError(f"{name}: {key} is {sizes[key]!r}, expected a whole number above 0")
    for whole, part in (("latent_size", "patch_size"), ("dim", "num_heads")):
        if {whole, part} <= sizes.keys() and sizes[whole] % sizes[part]:
            raise ConfigError(
                f"{name}: {whole} {sizes[whole]} is not a multiple of {part} {sizes[part]}; "
                "change one of them"
            )
    if sizes.get("dim", 0) % 2:
        raise ConfigError(f"{name}: dim {sizes['dim']} is odd, expected an even number")
