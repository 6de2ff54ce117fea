"""The record of the weights that a run starts from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from d2i.backbones import presets_of
from d2i.config import SCRATCH, BackboneConfig
from d2i.io.checksums import known_sha256
from d2i.models.pipeline_dir import PipelineDirectory
from d2i.models.weights.detect import detect_weights
from d2i.models.weights.load import read_state_dict, weights_file
from d2i.weights_resolve import resolve_weights


def describe_initial_weights(config: BackboneConfig) -> dict[str, Any]:
    """Describe the weights that a backbone is built with.

    Returns:
        `file`, its name; `sha256` of its bytes; `keys`, the number of its tensors; `layout`, the
        published files that have exactly these keys and shapes; `initialisation`, True if the
        weights are untrained. For random weights `file` is "scratch" and the others are absent.
        Of a pipeline's directory, `file` is its name, and `sha256` that of its network's state in
        float32.

    Raises:
        CheckpointError: If the file cannot be read.
        OSError: If a URL cannot be read.
    """
    if config.weights is None or config.is_random:
        return {"file": SCRATCH}
    if presets_of(config.name).pipeline:
        return _describe_pipeline(PipelineDirectory(config.weights, presets_of(config.name)))
    path = Path(resolve_weights(config.weights))
    file = weights_file(path)
    state = read_state_dict(path)
    found = detect_weights(state)
    return {
        "file": config.weights if config.weights.startswith("demo:") else file.name,
        "sha256": known_sha256(str(file)),
        "keys": len(state),
        "layout": [published.name for published in found.published] if found else [],
        "initialisation": is_initialisation(state),
    }


def _describe_pipeline(directory: PipelineDirectory) -> dict[str, Any]:
    state = dict(directory.network_weights())
    return {
        "file": directory.name,
        "sha256": directory.network_sha256(),
        "keys": len(state),
        "layout": [],
        "initialisation": is_initialisation(state),
    }


def base_sha256(config: BackboneConfig) -> str | None:
    """Return the sha256 of the network that a pipeline's directory holds; None for other weights.

    Raises:
        CheckpointError: If it cannot be read.
    """
    presets = presets_of(config.name)
    if presets.pipeline is None or config.weights is None:
        return None
    return PipelineDirectory(config.weights, presets).network_sha256()


def is_initialisation(state: Mapping[str, Tensor]) -> bool:
    """Return whether weights look untrained: a norm weight is all 1, or a bias all 0.

    Training moves every one of them, so trained weights have neither. A random network has the
    published keys and shapes too; this distinguishes it from the published file.

    Args:
        state: Tensors by key, in any layout.
    """
    vectors = {key: tensor for key, tensor in state.items() if tensor.dim() == 1}
    norms = (tensor for key, tensor in vectors.items() if _is_norm_weight(key))
    biases = (tensor for key, tensor in vectors.items() if key.endswith(".bias"))
    return any(bool((tensor == 1).all()) for tensor in norms) or any(
        bool((tensor == 0).all()) for tensor in biases
    )


def _is_norm_weight(key: str) -> bool:
    return key.endswith(".weight") and "norm" in key.split(".")[-2]
