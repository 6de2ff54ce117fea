"""LoRA adapters for published pipelines, found and named before anything is loaded.

Importing this module imports no torch.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d2i.errors import CheckpointError, ClusterError, ConfigError
from d2i.io import storage
from d2i.io.checksums import file_sha256

_PUBLISHED_NAME = "pytorch_lora_weights.safetensors"
_NAME_IN_PIPELINE = "d2i"
# Names of a pair of low-rank matrices in peft, in diffusers before peft, and in kohya's trainers.
_PLACED = ("lora_A.", "lora_B.")
_HELD = (*_PLACED, "lora.down.", "lora.up.", "lora_down.", "lora_up.")


@dataclass(frozen=True)
class Adapter:
    """The file of a LoRA adapter.

    Args:
        path: The safetensors file.
        sha256: Of the file.
    """

    path: str
    sha256: str

    @property
    def name(self) -> str:
        """Its name in tables: that of its file, or of its directory for the published file name."""
        path = Path(self.path)
        return path.parent.name if path.name == _PUBLISHED_NAME else path.stem


def find_adapter(place: str) -> Adapter:
    """Find the adapter that `--adapter` names: a safetensors file, or a directory containing one.

    Raises:
        ConfigError: If there is none, or more than one.
    """
    path = Path(storage.absolute(place)).resolve()
    if path.is_dir():
        named, files = path / _PUBLISHED_NAME, sorted(path.glob("*.safetensors"))
        if not named.is_file() and len(files) != 1:
            raise ConfigError(
                f"--adapter {place}: got {len(files)} safetensors files in the directory, expected "
                f"{_PUBLISHED_NAME} or a single one; pass the path of the file"
            )
        path = named if named.is_file() else files[0]
    if not path.is_file():
        raise ConfigError(
            f"--adapter {place}: does not exist; expected the safetensors file of a LoRA, or its "
            "directory"
        )
    return Adapter(str(path), file_sha256(str(path)))


def load_adapter(pipeline: Any, adapter: Adapter) -> None:
    """Load an adapter into a pipeline, from any layout that its `load_lora_weights` reads.

    Raises:
        ClusterError: If peft is not installed.
        ConfigError: If the pipeline takes no adapter.
        CheckpointError: If the file is not an adapter, or a part of it does not fit the pipeline.
    """
    from diffusers.utils.constants import USE_PEFT_BACKEND

    kind = type(pipeline).__name__
    if not hasattr(pipeline, "load_lora_weights"):
        raise ConfigError(f"--adapter: {kind} takes no LoRA adapter; remove --adapter")
    if not USE_PEFT_BACKEND:
        raise ClusterError("--adapter: peft is not installed; pip install 'd2i[lora]'")
    _expect_lora(adapter)
    # It warns of each part of the pipeline that the adapter leaves alone.
    logging.getLogger("diffusers.loaders").setLevel(logging.ERROR)
    try:
        converted = pipeline.lora_state_dict(adapter.path)
        pipeline.load_lora_weights(adapter.path, adapter_name=_NAME_IN_PIPELINE)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError) as err:
        reason = " ".join(str(err).split())[:200]
        raise CheckpointError(
            f"--adapter {adapter.path}: {kind} cannot read it: {reason}; expected a LoRA that was "
            "trained on this pipeline's base model"
        ) from err
    num_held = _num_named(converted[0] if isinstance(converted, tuple) else converted, _HELD)
    num_placed = _num_named(_weights(pipeline), _PLACED)
    if num_placed < num_held or not num_held:
        raise CheckpointError(
            f"--adapter {adapter.path}: {num_placed} of its {num_held} matrices fit {kind}, "
            "expected all; pass a LoRA that was trained on this pipeline's base model"
        )


def _expect_lora(adapter: Adapter) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(adapter.path, framework="pt") as file:
            names = list(file.keys())
    except (SafetensorError, OSError) as err:
        raise CheckpointError(
            f"--adapter {adapter.path}: not a complete safetensors file ({err}); expected a LoRA; "
            "check --adapter, or download the file again"
        ) from err
    if not _num_named(names, _HELD):
        got = f"such as {names[0]}" if names else "none"
        raise CheckpointError(
            f"--adapter {adapter.path}: not a LoRA: got {len(names)} tensors, {got}; expected "
            "pairs of low-rank matrices, such as …lora_A.weight and …lora_B.weight"
        )


def _weights(pipeline: Any) -> Iterator[str]:
    import torch

    for module in pipeline.components.values():
        if isinstance(module, torch.nn.Module):
            yield from (name for name, _ in module.named_parameters())


def _num_named(names: Iterable[str], marks: tuple[str, ...]) -> int:
    return sum(any(mark in name for mark in marks) for name in names)
