"""The text encoders of a diffusers pipeline, as the pipeline itself runs them."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from d2i.backbones import Presets
from d2i.config import TextConfig
from d2i.encoders.pretrained import freeze, pretrained_bytes
from d2i.encoders.prompt_truncation import PromptTruncation
from d2i.encoders.text_probe import NEXT_STEP, probe_text
from d2i.errors import CheckpointError, ConfigError
from d2i.models.pipeline_dir import PipelineDirectory, read_index, read_part_config
from d2i.tokenize import clean

Encoded = dict[str, NDArray[np.float16]]
"""The text conditions of N lines, by name: `text` (N, T, D), and `pooled` (N, P) where there is."""


class PipelineText:
    """Encodes lines with a pipeline's own encoders, in float32, at a fixed, padded batch size.

    Args:
        name: The directory of the pipeline, or its repository in the local cache.
        presets: Of the family of its network.
        config: Which side is kept of a line that is too long for an encoder.
        batch_size: Lines per call.
        device: The torch device to run on.

    Raises:
        CheckpointError: If it cannot be loaded.
        ConfigError: If an encoder's window cannot be found, or its text does not pass the probe.
    """

    def __init__(
        self, name: str, presets: Presets, config: TextConfig, batch_size: int, device: str
    ) -> None:
        directory = PipelineDirectory(name, presets)
        self._pipeline = load_text_parts(directory.path, device)
        self._reading = PromptTruncation(self._pipeline, {}, config.keep)
        if problems := probe_text(self._pipeline, self._reading):
            raise ConfigError(f"{directory.name}: {problems[0]}; {NEXT_STEP}")
        self._batch_size, self._device = batch_size, device
        # A tokenizer's settings change while it runs, so threads take turns.
        self._lock = threading.Lock()

    def encode(self, lines: Sequence[str]) -> Encoded:
        """Encode N lines, N >= 1; a special token that a line spells stays plain text."""
        texts = [self._reading.read(clean(line)) for line in lines]
        parts = []
        for start in range(0, len(texts), self._batch_size):
            rows = texts[start : start + self._batch_size]
            padded = rows + rows[:1] * (self._batch_size - len(rows))
            found, _ = self._run(padded)
            parts.append({key: value[: len(rows)] for key, value in found.items()})
        return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}

    def encode_empty(self) -> Encoded:
        """Return what the pipeline guides away from, without the batch axis: (T, D) and (P,).

        It is the encoded '' or, where the pipeline says so, zeros.
        """
        _, empty = self._run([""] * self._batch_size, with_empty=True)
        return {key: value[0] for key, value in empty.items()}

    def _run(self, texts: list[str], *, with_empty: bool = False) -> tuple[Encoded, Encoded]:
        """Return the conditions of texts, and those of '' if asked for."""
        with self._lock, torch.inference_mode():
            outputs = self._pipeline.encode_prompt(
                prompt=texts,
                device=self._device,
                num_images_per_prompt=1,
                do_classifier_free_guidance=with_empty,
            )
        # Text and that of '', then pooled text and that of ''.
        names = ("text", "pooled")[: len(outputs) // 2]
        found = {name: _half(outputs[2 * index]) for index, name in enumerate(names)}
        if not with_empty:
            return found, {}
        return found, {name: _half(outputs[2 * index + 1]) for index, name in enumerate(names)}


def _half(rows: Tensor) -> NDArray[np.float16]:
    with np.errstate(over="ignore"):
        return rows.float().cpu().numpy().astype(np.float16)


def load_text_parts(path: Path, device: str, dtype: torch.dtype = torch.float32) -> Any:
    """Load a pipeline of diffusers for its text alone: its other networks take no memory.

    Args:
        path: A directory that `save_pretrained` wrote.
        device: The torch device of its text encoders.
        dtype: Of its text encoders.

    Raises:
        CheckpointError: If it cannot be loaded.
    """
    import diffusers

    index = read_index(path)
    kind = getattr(diffusers, str(index.get("_class_name")), None)
    if kind is None:
        raise CheckpointError(
            f"{path} is a {index.get('_class_name')}; expected a pipeline of diffusers; update "
            "diffusers, or use another base model"
        )
    left_out = ("safety_checker", "feature_extractor", "image_encoder")
    taken = inspect.signature(kind).parameters
    parts: dict[str, Any] = {name: None for name in left_out if name in taken}
    try:
        pipeline = kind.from_pretrained(
            str(path),
            **parts,
            **_networks(path, index),
            use_safetensors=True,
            dtype=dtype,
        )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError) as err:
        reason = (str(err).strip() or type(err).__name__).splitlines()[0][:200]
        raise CheckpointError(
            f"{path}: cannot load its text encoders: {reason}; expected a directory "
            "written by save_pretrained; copy the whole pipeline"
        ) from err
    for name, module in pipeline.components.items():
        if "text_encoder" in name and module is not None:
            freeze(module).to(device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def text_parts_bytes(name: str, presets: Presets) -> int:
    """Return the bytes of the text encoders that a `PipelineText` holds, without loading them.

    Args:
        name: The directory of the pipeline, or its repository in the local cache.
        presets: Of the family of its network.

    Raises:
        CheckpointError: If it is not that pipeline, or a configuration cannot be read.
    """
    import transformers

    path, total = PipelineDirectory(name, presets).path, 0
    for part, entry in read_index(path).items():
        if "text_encoder" not in part or not isinstance(entry, list) or entry[0] != "transformers":
            continue
        total += pretrained_bytes(getattr(transformers, str(entry[1])), str(path / part))
    return total


def _networks(path: Path, index: Mapping[str, Any]) -> dict[str, Any]:
    """Return diffusers' networks by their configs, without numbers."""
    import diffusers

    found = {}
    for part, entry in index.items():
        # A pipeline is where its first module by name is, which must be a text encoder.
        if part < "text_encoder" or not isinstance(entry, list) or entry[0] != "diffusers":
            continue
        kind = getattr(diffusers, str(entry[1]), None)
        if isinstance(kind, type) and issubclass(kind, diffusers.ModelMixin):
            with torch.device("meta"):
                found[part] = kind.from_config(read_part_config(path, part))
    return found
