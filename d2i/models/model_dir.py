"""A model directory: `config.json` (name and sizes of the backbone) beside its weights.

A run directory is read as one too: its `config.json` holds the backbone within its recipe.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from d2i.backbones import presets_of
from d2i.config import BackboneConfig, load_config
from d2i.errors import CheckpointError
from d2i.io import checksums, storage
from d2i.io.parse import parse_json_value
from d2i.models.registry import build_backbone, family_of_backbone
from d2i.weights_resolve import resolve_weights

CONFIG_NAME = "config.json"
_EDITED = f"if you edited it, delete {CONFIG_NAME}.sha256 to accept it; else restore it"


def build_network(config: BackboneConfig) -> nn.Module:
    """Build the backbone of a recipe, and load its weights if it names any.

    If the weights are in a model directory, its `config.json` gives the sizes that the recipe
    leaves open. If the recipe's network has other sizes than the weights were trained for, they are
    fitted by its family, such as the position embedding to more text windows.

    Returns:
        The network in float32 on the CPU; its `latent_scale` is the factor from raw VAE latents.

    Raises:
        CheckpointError: If the weights cannot be read or do not fit.
        ConfigError: If the sizes do not fit each other.
    """
    network = build_untrained(config)
    if config.weights is None or config.is_random:
        return network
    return family_of_backbone(config.name).load(_weights_path(config, config.weights), network)


def _weights_path(config: BackboneConfig, weights: str) -> str:
    """Return the place of weights on this machine; a pipeline's is never fetched."""
    return weights if presets_of(config.name).pipeline else resolve_weights(weights)


def build_untrained(config: BackboneConfig) -> nn.Module:
    """Build the backbone of a recipe without its weights, as they or the recipe describe it.

    Raises:
        CheckpointError: If the directory of its weights cannot be read.
        ConfigError: If the sizes do not fit each other.
    """
    described = None
    if config.weights is not None and not config.is_random:
        family = family_of_backbone(config.name)
        described = family.build_described(_weights_path(config, config.weights), config)
    return described or build_backbone(config.name, **resolve_sizes(config).overrides())


def resolve_sizes(config: BackboneConfig) -> BackboneConfig:
    """Fill in the sizes that a recipe leaves open from the `config.json` beside its weights."""
    is_described = presets_of(config.name).pipeline is not None
    if config.weights is None or config.is_random or is_described:
        return config
    there = read_config(Path(resolve_weights(config.weights)))
    if there is None:
        return config
    known = there.model_dump(exclude_none=True) | config.model_dump(exclude_none=True)
    return load_config(BackboneConfig, known, source=str(config.weights))


def write_config(directory: str | Path, config: BackboneConfig) -> None:
    """Write the name and sizes of a backbone into its model directory."""
    data = (json.dumps(_described(config), indent=1) + "\n").encode()
    checksums.write_bytes(storage.join(str(directory), CONFIG_NAME), data)


def _described(config: BackboneConfig) -> dict[str, Any]:
    return {"name": config.name} | config.overrides()


def read_config(path: Path) -> BackboneConfig | None:
    """Read the backbone that the `config.json` of a model directory or a run names.

    Returns:
        None if there is no such file, or another program wrote it.

    Raises:
        CheckpointError: If it is not JSON, or does not match its checksum.
        ConfigError: If it names an unknown backbone or size.
    """
    file = path / CONFIG_NAME
    if not file.is_file():
        return None
    values = _read_values(file)
    if isinstance(values, dict) and isinstance(values.get("recipe"), dict):
        values = values["recipe"].get("backbone", {}) | {"weights": None}
    if not isinstance(values, dict) or "name" not in values:
        return None
    return load_config(BackboneConfig, values, source=str(file))


def _read_values(file: Path) -> Any:
    """Read any JSON; a missing checksum is no error, as only files that d2i wrote have one."""
    refused: dict[str, Any] = {"error": CheckpointError, "next_step": _EDITED}
    checksums.check_if_summed(str(file), **refused)
    return parse_json_value(storage.read_bytes(str(file)), str(file), **refused)
