"""The text encoders of a diffusers pipeline, as the pipeline itself runs them."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from d2i.backbones import Presets
from d2i.config import Precision, TextConfig
from d2i.encoders.chat_text import ChatText
from d2i.encoders.pretrained import freeze, pretrained_bytes
from d2i.encoders.prompt_truncation import PromptTruncation
from d2i.encoders.text_probe import NEXT_STEP, probe_chat, probe_text
from d2i.errors import CheckpointError, ConfigError
from d2i.models.pipeline_dir import PipelineDirectory, read_index, read_part_config
from d2i.models.pipeline_family import PipelineFamily
from d2i.prompt_text import Message

Encoded = dict[str, NDArray[Any]]
"""The text conditions of N lines or chats, by name: `text` (N, T, D) always; `pooled` (N, P), and
`mask` (N, T), true where a row has text, where the family has them."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""The dtype of each precision."""


class PipelineText:
    """Encodes lines or chats with a pipeline's own encoders, at a fixed, padded batch size.

    Args:
        name: The directory of the pipeline, or its repository in the local cache.
        family: Of its network.
        config: The settings of text, such as the side that is kept of one that is too long.
        batch_size: Lines per call.
        device: The torch device to run on.
        precision: Of the encoders.
        is_offloaded: True to keep the encoders in the CPU's memory between calls.
        seed: Of the permuted roles of chats.

    Raises:
        CheckpointError: If it cannot be loaded.
        ConfigError: If an encoder's window cannot be found, its text does not pass the probe, or
            it has no chat template for `text.format=chat`.
    """

    def __init__(
        self,
        name: str,
        family: PipelineFamily,
        config: TextConfig,
        batch_size: int,
        device: str,
        precision: Precision = "fp32",
        *,
        is_offloaded: bool = False,
        seed: int = 0,
    ) -> None:
        directory = family.directory(name)
        self._family, self._is_offloaded = family, is_offloaded
        self._pipeline = load_text_parts(directory.path, device, precision)
        self._reading = PromptTruncation(self._pipeline, {}, config.keep)
        if problems := probe_text(self._pipeline, self._reading):
            raise ConfigError(f"{directory.name}: {problems[0]}; {NEXT_STEP}")
        self._batch_size, self._device = batch_size, device
        self._chat: ChatText | None = None
        if config.format == "chat":
            self._chat = open_chat(self._pipeline, family, config, seed, device, directory.name)
        # A tokenizer's settings change while it runs, so threads take turns.
        self._lock = threading.Lock()
        self._move_to("cpu")

    def encode(self, lines: Sequence[str]) -> Encoded:
        """Encode N lines, N >= 1; a special token that a line spells stays plain text."""
        with self._encoders_on_device():
            return self._encode([self._reading.read(self._family.clean(line)) for line in lines])

    def encode_chats(self, chats: Sequence[Sequence[Message]], keys: Sequence[str]) -> Encoded:
        """Encode N chats, N >= 1, of a pipeline that was opened for them; see `ChatText.write`.

        Args:
            chats: The messages of each.
            keys: The key of the sample of each.
        """
        assert self._chat is not None
        with self._encoders_on_device():
            texts = [self._chat.write(*chat) for chat in zip(chats, keys, strict=True)]
            with self._chat.as_given():
                return self._encode(texts)

    def _encode(self, texts: list[str]) -> Encoded:
        parts = []
        for start in range(0, len(texts), self._batch_size):
            rows = texts[start : start + self._batch_size]
            padded = rows + rows[:1] * (self._batch_size - len(rows))
            found = self._family.encode_prompts(self._pipeline, padded, self._device)
            parts.append({key: self._array(value[: len(rows)]) for key, value in found.items()})
        return join_encoded(parts)

    def encode_empty(self) -> Encoded:
        """Return what the pipeline guides away from, without the batch axis: (T, D) and (P,).

        It is the encoded '' or, where the pipeline says so, zeros.
        """
        with self._encoders_on_device():
            empty = self._family.unconditional(self._pipeline, self._batch_size, self._device)
            return {key: self._array(value[0]) for key, value in empty.items()}

    def _array(self, rows: Tensor) -> NDArray[Any]:
        """Return float16, as shards hold text, but the states of language models in float32.

        Those may exceed the range of float16.
        """
        if rows.dtype == torch.bool:
            return rows.cpu().numpy()
        exact = rows.float().cpu().numpy()
        with np.errstate(over="ignore"):
            return exact if self._family.presets.is_flow else exact.astype(np.float16)

    @contextmanager
    def _encoders_on_device(self) -> Iterator[None]:
        """Run the block alone, with the encoders on the device."""
        with self._lock, torch.inference_mode():
            self._move_to(self._device)
            yield
            self._move_to("cpu")

    def _move_to(self, device: str) -> None:
        """Move the encoders, if they are offloaded."""
        if self._is_offloaded:
            for module in _text_encoders(self._pipeline):
                module.to(device)


def open_chat(
    pipeline: Any, family: PipelineFamily, config: TextConfig, seed: int, device: str, name: str
) -> ChatText:
    """Return what writes the chats of a pipeline's language model, after a probe of it.

    Args:
        pipeline: The pipeline, on its device.
        family: Of its network.
        config: The settings of text.
        seed: Of the permuted roles.
        device: The torch device of its encoders.
        name: Of the pipeline, for errors.

    Raises:
        ConfigError: If it has no chat template, or its text does not pass the probe.
    """
    options = family.presets.chat
    if options is None:
        raise ConfigError(
            f"text.format=chat: the text encoder of {family.name} has no chat template; expected "
            "text.format=line; remove the setting"
        )
    chat = ChatText(pipeline, options, config, family.num_text_tokens, seed)
    # Roles as spoken: permuted ones differ by sample.
    spoken = config.model_copy(update={"roles": "speaker"})
    probed = ChatText(pipeline, options, spoken, family.num_text_tokens)

    def encode(texts: list[str]) -> object:
        with torch.inference_mode():
            return family.encode_prompts(pipeline, texts, device)

    if problems := probe_chat(probed, encode, pipeline):
        raise ConfigError(f"{name}: {problems[0]}; {NEXT_STEP}")
    return chat


def join_encoded(parts: Sequence[Encoded]) -> Encoded:
    """Join conditions; texts are filled up with 0 to the longest."""
    longest = max(part["text"].shape[1] for part in parts)
    return {
        name: np.concatenate([_filled(part[name], longest, name) for part in parts])
        for name in parts[0]
    }


def _filled(rows: NDArray[Any], length: int, name: str) -> NDArray[Any]:
    if name not in ("text", "mask") or rows.shape[1] == length:
        return rows
    filled = np.zeros((len(rows), length, *rows.shape[2:]), rows.dtype)
    filled[:, : rows.shape[1]] = rows
    return filled


def load_text_parts(path: Path, device: str, precision: Precision = "fp32") -> Any:
    """Load a pipeline of diffusers for its text alone: its other networks take no memory.

    Args:
        path: A directory that `save_pretrained` wrote.
        device: The torch device of its text encoders.
        precision: Of its text encoders.

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
            dtype=DTYPES[precision],
        )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError) as err:
        reason = (str(err).strip() or type(err).__name__).splitlines()[0][:200]
        raise CheckpointError(
            f"{path}: cannot load its text encoders: {reason}; expected a directory "
            "written by save_pretrained; copy the whole pipeline"
        ) from err
    for module in _text_encoders(pipeline):
        freeze(module).to(device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _text_encoders(pipeline: Any) -> list[Any]:
    parts = pipeline.components.items()
    return [module for name, module in parts if "text_encoder" in name and module is not None]


def text_parts_bytes(name: str, presets: Presets, precision: Precision) -> int:
    """Return the bytes of the text encoders that a `PipelineText` holds, without loading them.

    Args:
        name: The directory of the pipeline, or its repository in the local cache.
        presets: Of the family of its network.
        precision: Of the encoders.

    Raises:
        CheckpointError: If it is not that pipeline, or a configuration cannot be read.
    """
    import transformers

    path, total = PipelineDirectory(name, presets).path, 0
    for part, entry in read_index(path).items():
        if "text_encoder" not in part or not isinstance(entry, list) or entry[0] != "transformers":
            continue
        kind = getattr(transformers, str(entry[1]))
        total += pretrained_bytes(kind, str(path / part), DTYPES[precision])
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
