"""Weights read for inspection or conversion: their file, their kind, and the network they fit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from d2i.backbones import presets_of
from d2i.config import BackboneConfig, apply_settings, load_config
from d2i.errors import CheckpointError, ConfigError
from d2i.io.checksums import file_sha256
from d2i.models.model_dir import read_config
from d2i.models.registry import build_backbone
from d2i.models.weights.autoencoder_layout import (
    autoencoder_config,
    ldm_to_diffusers,
    with_new_names,
)
from d2i.models.weights.detect import (
    PREFIX_KEYS,
    DetectedWeights,
    detect_weights,
    published_names,
)
from d2i.models.weights.load import (
    DIRECTORY_FILES,
    check_fits,
    check_numbers,
    fill_network,
    is_dense_floats,
    num_not_finite,
    read_described,
    read_state_dict,
    weights_file,
)
from d2i.weights_catalog import shapes_hash


@dataclass(frozen=True)
class Source:
    """Weights that were read: their file and its hash, the tensors by name, and their kind."""

    path: Path
    file: Path
    sha256: str
    state: Mapping[str, Tensor]
    found: DetectedWeights


def open_source(path: Path) -> Source:
    """Read weights in any published form, and detect what they are.

    Raises:
        CheckpointError: If they cannot be read, are of no known kind, or hold NaN or infinity.
    """
    file = weights_file(path)
    state = read_state_dict(path)
    found = detect_weights(state)
    if found is None:
        raise CheckpointError(
            f"{file} holds weights of an unknown kind ({len(state)} tensors, such as "
            f"{next(iter(state))}); expected a U-ViT, a UniDiffuser, a KL autoencoder or a caption "
            "decoder; see 'd2i weights list' for the published files"
        )
    check_numbers(state, file)
    return Source(path, file, file_sha256(str(file)), state, found)


def inspect_file(path: Path) -> dict[str, Any]:
    """Describe a file of weights as JSON values; unlike `open_source`, it accepts any tensors.

    Raises:
        CheckpointError: If it cannot be read.
    """
    file, state = weights_file(path), read_state_dict(path)
    found = detect_weights(state)
    shapes = {key: list(tensor.shape) for key, tensor in state.items()}
    return {
        "file": str(file),
        "size_bytes": file.stat().st_size,
        "sha256": file_sha256(str(file)),
        "what": found.words if found else None,
        "kind": found.kind if found else None,
        "layout": found.layout if found else None,
        "backbone": found.backbone if found else None,
        "published": [published.name for published in found.published] if found else [],
        "num_tensors": len(state),
        "not_finite": {key: n for key, t in state.items() if (n := num_not_finite(t))},
        "num_parameters": sum(tensor.numel() for tensor in state.values()),
        "dtypes": Counter(str(tensor.dtype).removeprefix("torch.") for tensor in state.values()),
        "shapes": shapes,
        "shapes_sha256": shapes_hash(shapes),
    }


def backbone_config(source: Source, settings: Sequence[str]) -> BackboneConfig:
    """Return the name of a backbone and the sizes in which it differs from its preset.

    They come from the `config.json` beside the weights, else from the tensors and the file's
    metadata; `settings` override both.

    Raises:
        ConfigError: If a size that the tensors do not reveal is not in `settings`.
    """
    is_of_a_directory = source.file.name in DIRECTORY_FILES
    beside = read_config(source.file.parent) if is_of_a_directory else None
    if beside is not None:
        return apply_settings(beside, settings)
    name, detected_sizes = str(source.found.backbone), source.found.sizes or {}
    preset = presets_of(name).sizes[name]
    values: dict[str, Any] = {
        key: size for key, size in detected_sizes.items() if size != preset[key]
    }
    values |= _other_scale(source.file, preset["latent_scale"])
    config = load_config(BackboneConfig, {"name": name} | values, source=str(source.file))
    config = apply_settings(config, settings)
    hidden = {"latent_size", "num_text_tokens"} - set(detected_sizes)
    if "dim" in values:
        hidden.add("num_heads")
    if missing := [key for key in sorted(hidden) if getattr(config, key) is None]:
        raise ConfigError(
            f"{source.file} is {source.found.words}; its tensors do not reveal "
            f"{', '.join(missing)}; add {' '.join(f'--set {key}=N' for key in missing)}"
        )
    return config


def _other_scale(file: Path, preset: float) -> dict[str, str]:
    """Return the latent scale in the metadata of a d2i file, if it is not the published one."""
    recorded = read_described(file).get("latent_scale", repr(preset))
    return {} if recorded == repr(preset) else {"latent_scale": recorded}


def network_of(source: Source, settings: Sequence[str]) -> nn.Module:
    """Build the backbone of a source and load its tensors unchanged.

    Raises:
        CheckpointError: If they do not fit.
        ConfigError: As for `backbone_config`.
    """
    config = backbone_config(source, settings)
    with torch.device("meta"):
        network = build_backbone(config.name, **config.overrides())
    return fill_network(network, published_names(source.state), source.file)


def checked_autoencoder(source: Source) -> dict[str, Tensor]:
    """Return the autoencoder in diffusers' layout, after a check of every key and shape."""
    from diffusers import AutoencoderKL

    is_ldm = source.found.layout == "published"
    state = ldm_to_diffusers(source.state) if is_ldm else with_new_names(source.state)
    try:
        config = autoencoder_config(state)
        with torch.device("meta"):
            network: Any = AutoencoderKL(**{k: v for k, v in config.items() if k != "_class_name"})
    except KeyError as err:
        raise CheckpointError(
            f"{source.file} is {source.found.words} without {err}; the file is incomplete; "
            "download it again"
        ) from err
    except ValueError as err:
        raise CheckpointError(
            f"{source.file} is {source.found.words} that diffusers cannot build: {err}; expected "
            "block widths that are multiples of 32"
        ) from err
    check_fits(network, state, source.file)
    return state


def checked_prefix(state: Mapping[str, Tensor], path: str | Path) -> dict[str, Tensor]:
    """Return the two tensors of a caption decoder's text prefix, weight (out, in) and bias (out,).

    Raises:
        CheckpointError: If one is missing, or they do not form one linear layer.
    """
    prefix = {key: state[key] for key in PREFIX_KEYS if key in state}
    shapes = [tuple(tensor.shape) for tensor in prefix.values() if is_dense_floats(tensor)]
    if [len(shape) for shape in shapes] != [2, 1] or shapes[0][:1] != shapes[1] or 0 in shapes[0]:
        found = [f"{key} {tensor.dtype} {tuple(tensor.shape)}" for key, tensor in prefix.items()]
        raise CheckpointError(
            f"{path} holds {', '.join(found) or 'no encode_prefix'}; expected encode_prefix.weight "
            "(out, in) and encode_prefix.bias (out,), as in UniDiffuser's caption_decoder.pth; use "
            "that file"
        )
    return prefix
