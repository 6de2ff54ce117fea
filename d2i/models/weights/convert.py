"""Conversion of weights between published files, d2i's model directories and diffusers'.

A converted directory has a model card (`README.md`): origin, training data and licence.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from d2i.errors import CheckpointError, ConfigError
from d2i.io import checksums, storage
from d2i.models.model_dir import CONFIG_NAME, write_config
from d2i.models.registry import family_of_backbone
from d2i.models.weights.autoencoder_layout import autoencoder_config, diffusers_to_ldm
from d2i.models.weights.detect import LayoutName
from d2i.models.weights.load import save_torch, save_weights
from d2i.models.weights.source import (
    Source,
    backbone_config,
    checked_autoencoder,
    checked_prefix,
    network_of,
    open_source,
)
from d2i.weights_catalog import PublishedFile

MODEL_NAME = "model.safetensors"
DIFFUSERS_NAME = "diffusion_pytorch_model.safetensors"
CARD_NAME = "README.md"
_UNKNOWN = (
    "Unknown to d2i: the tensors match no published file. State here what they were trained on, "
    "and what the licences of that data and of the initial weights allow."
)


def import_weights(path: Path, out: str | Path, settings: Sequence[str] = ()) -> Source:
    """Convert weights in any published form to a model directory.

    `backbone.weights` takes the directory of a backbone, `encoders.vae` that of an autoencoder, and
    `encoders.text_prefix` that of a text prefix. The weights are written last: a directory without
    them is unfinished.

    Args:
        path: as for `load_weights`.
        out: the directory to create, a path or a URL.
        settings: `NAME=VALUE` for backbone sizes that its tensors do not reveal.

    Raises:
        CheckpointError: If they cannot be read, do not fit, or `out` already holds weights.
        ConfigError: If a size is missing or wrong.
    """
    source, out = open_source(path), str(out)
    _refuse_encoder(source)
    _refuse_to_overwrite(out)
    {
        "backbone": _import_backbone,
        "autoencoder": _import_autoencoder,
        "text prefix": _import_prefix,
    }[source.found.kind](source, out, settings)
    return source


def export_weights(
    path: Path, out: str | Path, layout: LayoutName, settings: Sequence[str] = ()
) -> Source:
    """Write weights in a layout that other programs read.

    Args:
        path: a model directory, or any form that `load_weights` takes.
        out: a path or a URL. `published`: the file to write, `.pth` or `.safetensors`. `diffusers`:
            the directory.
        layout: the key names to write.
        settings: as for `import_weights`.

    Raises:
        CheckpointError: If they cannot be read or do not fit, or do not exist in that layout.
        ConfigError: If a size is missing or wrong.
    """
    source, out = open_source(path), str(out)
    _refuse_encoder(source)
    if layout == "published":
        _write_published(_published_state(source, settings), out)
        return source
    if source.found.kind == "autoencoder":
        _refuse_settings(settings)
        _write_autoencoder(checked_autoencoder(source), out)
    elif source.found.backbone and layout in family_of_backbone(source.found.backbone).layouts:
        theirs = family_of_backbone(source.found.backbone).layouts[layout]
        network = network_of(source, settings)
        _write_diffusers(theirs.from_published(network.state_dict()), theirs.config(network), out)
    else:
        raise CheckpointError(
            f"{source.file} is {source.found.words}; diffusers has no such model; expected a "
            "UniDiffuser or an autoencoder; use --to published"
        )
    return source


def _import_backbone(source: Source, out: str, settings: Sequence[str]) -> None:
    config = backbone_config(source, settings)
    network = network_of(source, settings)
    _write_card(source, out, "backbone.weights")
    write_config(out, config)
    save_weights(network, storage.join(out, MODEL_NAME))


def _import_autoencoder(source: Source, out: str, settings: Sequence[str]) -> None:
    _refuse_settings(settings)
    state = checked_autoencoder(source)
    _write_card(source, out, "encoders.vae")
    _write_autoencoder(state, out)


def _import_prefix(source: Source, out: str, settings: Sequence[str]) -> None:
    _refuse_settings(settings)
    prefix = checked_prefix(source.state, source.file)
    _write_card(source, out, "encoders.text_prefix")
    save_weights(prefix, storage.join(out, MODEL_NAME))


def _published_state(source: Source, settings: Sequence[str]) -> Mapping[str, Tensor]:
    if source.found.kind == "backbone":
        return network_of(source, settings).state_dict()
    _refuse_settings(settings)
    if source.found.kind == "autoencoder":
        return diffusers_to_ldm(checked_autoencoder(source))
    return checked_prefix(source.state, source.file)


def _write_published(state: Mapping[str, Tensor], out: str) -> None:
    if not out.endswith((".pth", ".safetensors")):
        raise ConfigError(
            f"--out {out}: expected a file that ends in .pth or .safetensors; change the name"
        )
    if out.endswith(".pth"):
        save_torch(state, out)
    else:
        save_weights(state, out)


def _write_autoencoder(state: Mapping[str, Tensor], out: str) -> None:
    _write_diffusers(state, autoencoder_config(state), out)


def _write_diffusers(state: Mapping[str, Tensor], config: Mapping[str, Any], out: str) -> None:
    data = (json.dumps(config, indent=1) + "\n").encode()
    checksums.write_bytes(storage.join(out, CONFIG_NAME), data)
    save_weights(state, storage.join(out, DIFFUSERS_NAME))


def _write_card(source: Source, out: str, use: str) -> None:
    found = source.found
    card = model_card(found.words, source.file.name, source.sha256, found.published, use)
    storage.write_bytes(storage.join(out, CARD_NAME), card.encode())


def _refuse_encoder(source: Source) -> None:
    if source.found.kind == "encoder":
        raise CheckpointError(
            f"{source.file} is {source.found.words}, which needs no conversion; expected a "
            "backbone, a KL autoencoder or a caption decoder; use it directly, with "
            "--set encoders.…"
        )


def _refuse_to_overwrite(out: str) -> None:
    if any(storage.exists(storage.join(out, name)) for name in (MODEL_NAME, DIFFUSERS_NAME)):
        raise CheckpointError(f"--out {out} already holds weights; choose another directory")


def _refuse_settings(settings: Sequence[str]) -> None:
    if settings:
        raise ConfigError(f"--set {settings[0]}: only a backbone has sizes to set; leave it out")


def model_card(
    words: str, source: str, sha256: str, published: Sequence[PublishedFile], use: str
) -> str:
    """Return the text of a model card.

    Args:
        words: Description of the weights.
        source: Name of the file that they came from.
        sha256: Hash of that file.
        published: Published files with the same keys and shapes (fine-tuned weights share them).
        use: The setting that takes the directory.
    """
    return "\n".join(
        [
            f"# {words}",
            "",
            f"From `{source}`, sha256 `{sha256}`. Use it with `--set {use}=DIR`.",
            "",
            "## Data and licence",
            *_origin(published),
            "",
        ]
    )


def _origin(published: Sequence[PublishedFile]) -> list[str]:
    if not published:
        return [_UNKNOWN]
    lines = [
        "The keys and shapes are those of the files below. Fine-tuned weights match too: then add",
        "the fine-tuning data, and whether it may be redistributed (MMDialog may not).",
        "",
    ]
    for file in published:
        lines += [
            f"- `{file.name}` ({file.holds}): {file.source}.",
            f"  Trained on {file.data}. Licence: {file.licence}; read it at the source.",
        ]
    return lines
