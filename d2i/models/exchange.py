"""Weights between their forms: published files, d2i's model folders, and diffusers' folders."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from d2i import storage
from d2i.errors import CheckpointError, ConfigError
from d2i.models.autoencoder_layout import autoencoder_config, diffusers_to_ldm
from d2i.models.card import CARD_NAME, model_card
from d2i.models.diffusers_layout import diffusers_config, to_diffusers
from d2i.models.folder import CONFIG_NAME, write_config
from d2i.models.recognize import PREFIX_KEYS, Layout
from d2i.models.source import (
    Source,
    backbone_config,
    checked_autoencoder,
    network_of,
    open_source,
)
from d2i.models.weights import save_torch, save_weights

MODEL_NAME = "model.safetensors"
DIFFUSERS_NAME = "diffusion_pytorch_model.safetensors"


def import_weights(path: Path, out: Path, settings: Sequence[str] = ()) -> Source:
    """Make a model folder out of weights in any published form.

    A backbone's folder is what `backbone.weights` takes, an autoencoder's `encoders.vae`, the text
    prefix's `encoders.text_prefix`. The weights are written last: a folder without is unfinished.

    Args:
        path: as for `load_weights`.
        out: the folder to make.
        settings: `NAME=VALUE` for sizes of a backbone that its tensors do not tell.

    Raises:
        CheckpointError: If they cannot be read, do not fit, or `out` holds weights already.
        ConfigError: If a size is missing or wrong.
    """
    source = open_source(path)
    _refuse_to_overwrite(out)
    {
        "backbone": _import_backbone,
        "autoencoder": _import_autoencoder,
        "text prefix": _import_prefix,
    }[source.found.kind](source, out, settings)
    return source


def export_weights(path: Path, out: Path, layout: Layout, settings: Sequence[str] = ()) -> Source:
    """Write weights as other programs read them.

    Args:
        path: a model folder, or any form that `load_weights` takes.
        out: `published`: the file to write, `.pth` or `.safetensors`. `diffusers`: the folder.
        layout: whose key names to write.
        settings: as for `import_weights`.

    Raises:
        CheckpointError: If they cannot be read or do not fit, or have no such layout.
        ConfigError: If a size is missing or wrong.
    """
    source = open_source(path)
    if layout == "published":
        _write_published(_published_state(source, settings), out)
        return source
    if source.found.kind == "autoencoder":
        _write_autoencoder(checked_autoencoder(source), out)
    elif source.found.backbone and source.found.backbone.startswith("unidiffuser"):
        network = network_of(source, settings)
        _write_diffusers(to_diffusers(network.state_dict()), diffusers_config(network), out)
    else:
        raise CheckpointError(
            f"{source.file} is {source.found.words}; diffusers has no such model; expected a "
            "UniDiffuser or an autoencoder; use --to published"
        )
    return source


def _import_backbone(source: Source, out: Path, settings: Sequence[str]) -> None:
    config = backbone_config(source, settings)
    network = network_of(source, settings)
    _write_card(source, out, "backbone.weights")
    write_config(out, config)
    save_weights(network, out / MODEL_NAME)


def _import_autoencoder(source: Source, out: Path, settings: Sequence[str]) -> None:
    _refuse_settings(settings)
    state = checked_autoencoder(source)
    _write_card(source, out, "encoders.vae")
    _write_autoencoder(state, out)


def _import_prefix(source: Source, out: Path, settings: Sequence[str]) -> None:
    _refuse_settings(settings)
    _write_card(source, out, "encoders.text_prefix")
    save_weights({key: source.state[key] for key in PREFIX_KEYS}, out / MODEL_NAME)


def _published_state(source: Source, settings: Sequence[str]) -> Mapping[str, Tensor]:
    if source.found.kind == "backbone":
        return network_of(source, settings).state_dict()
    _refuse_settings(settings)
    if source.found.kind == "autoencoder":
        return diffusers_to_ldm(checked_autoencoder(source))
    return {key: source.state[key] for key in PREFIX_KEYS}


def _write_published(state: Mapping[str, Tensor], out: Path) -> None:
    if out.suffix not in (".pth", ".safetensors"):
        raise ConfigError(
            f"--out {out}: expected a file that ends in .pth or .safetensors; change the name"
        )
    if out.suffix == ".pth":
        save_torch(state, out)
    else:
        save_weights(state, out)


def _write_autoencoder(state: Mapping[str, Tensor], out: Path) -> None:
    _write_diffusers(state, autoencoder_config(state), out)


def _write_diffusers(state: Mapping[str, Tensor], config: Mapping[str, Any], out: Path) -> None:
    data = (json.dumps(config, indent=1) + "\n").encode()
    storage.write_bytes(str(out / CONFIG_NAME), data)
    save_weights(state, out / DIFFUSERS_NAME)


def _write_card(source: Source, out: Path, use: str) -> None:
    found = source.found
    card = model_card(found.words, source.file.name, source.sha256, found.published, use)
    storage.write_bytes(str(out / CARD_NAME), card.encode())


def _refuse_to_overwrite(out: Path) -> None:
    if any((out / name).exists() for name in (MODEL_NAME, DIFFUSERS_NAME)):
        raise CheckpointError(f"--out {out} holds weights already; choose another folder")


def _refuse_settings(settings: Sequence[str]) -> None:
    if settings:
        raise ConfigError(f"--set {settings[0]}: only a backbone has sizes to set; leave it out")
