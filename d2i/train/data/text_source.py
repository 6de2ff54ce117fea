"""The text conditions of a batch: as shards store them, or encoded while training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from d2i.backbones import chat_problem, presets_of
from d2i.config import Recipe, TextConfig
from d2i.dialog import Turn
from d2i.encoders import ClipText, load_clip_text
from d2i.encoders.clip_text import clip_text_bytes
from d2i.encoders.data_fingerprint import check_encoder_hashes
from d2i.encoders.pipeline_text import Encoded, PipelineText, text_parts_bytes
from d2i.errors import ConfigError
from d2i.models.pipeline_family import pipeline_family
from d2i.prompt_text import context_messages, context_roles, context_text, text_tokens
from d2i.shards import ShardReader
from d2i.train.data.encoded_once import EncodedOnce


class TextSource(Protocol):
    """The text conditions of a data set's samples, by name; `text` (B, T, D) always."""

    def read(self, indices: NDArray[np.int64]) -> Encoded:
        """Return the conditions of samples, each (B, ...)."""
        ...

    @property
    def empty(self) -> Encoded:
        """The conditions in place of those that are dropped, without the batch axis."""
        ...


def prepare_text(open_text: OpenText, readers: Iterable[ShardReader]) -> None:
    """Encode the texts of data sets, if that is to be done before training."""
    for reader in readers:
        source = open_text(reader)
        if isinstance(source, EncodedOnce):
            source.prepare()


Sample = Mapping[str, Any]
"""The `json` member of a sample, decoded."""
OpenText = Callable[[ShardReader], TextSource]
"""From a data set to the text of its samples; all share one encoder."""


class StoredText:
    """Text latents as shards store them.

    Args:
        reader: The shards.
        empty: The latents of ''; by default those that shards of format 1 store.
    """

    def __init__(self, reader: ShardReader, empty: Encoded | None = None) -> None:
        self._reader, self._empty = reader, empty

    def read(self, indices: NDArray[np.int64]) -> Encoded:
        """Return the stored latents."""
        return {"text": self._reader.read(indices, members=["text"])["text"]}

    @cached_property
    def empty(self) -> Encoded:
        """The latents of ''."""
        return self._empty or {"text": self._reader.empty_text}


class StoredTokens:
    """Text latents of the token ids that shards store.

    Args:
        reader: The shards.
        encode: From token ids (B, 77 W) to their latents.
        empty_tokens: Ids of ''.
    """

    def __init__(
        self,
        reader: ShardReader,
        encode: Callable[[NDArray[np.uint16]], Encoded],
        empty_tokens: NDArray[np.uint16],
    ) -> None:
        self._reader, self._encode, self._empty_tokens = reader, encode, empty_tokens

    def read(self, indices: NDArray[np.int64]) -> Encoded:
        """Encode the stored tokens."""
        return self._encode(self._reader.read(indices, members=["tokens"])["tokens"])

    @cached_property
    def empty(self) -> Encoded:
        """The latents of ''."""
        return _first(self._encode(self._empty_tokens[None]))


class DialogText:
    """Text latents of the dialogs that shards hold as JSON.

    Args:
        reader: The shards.
        encode: From the `json` members of samples to their conditions.
        empty: What replaces a condition that is dropped.
    """

    def __init__(
        self, reader: ShardReader, encode: Callable[[Sequence[Sample]], Encoded], empty: Encoded
    ) -> None:
        self._reader, self._encode = reader, encode
        self.empty = empty

    def read(self, indices: NDArray[np.int64]) -> Encoded:
        """Write and encode the contexts of samples.

        Raises:
            DataError: If a chat cannot be made of one; see `context_roles`.
        """
        return self._encode([self._reader.read_json(int(index)) for index in indices])


def build_text(recipe: Recipe, reader: ShardReader, device: str) -> OpenText:
    """Return what opens the text of the training shards, and of those prepared with them.

    Args:
        recipe: Says whether text is read as stored, and by what it is encoded else.
        reader: The training shards.
        device: The torch device of the encoder.

    Raises:
        CheckpointError: If an encoder cannot be loaded, or stored text was made with another one.
        ConfigError: If shards cannot hold the text of this backbone, or hold another one's, or
            its encoder cannot read chats.
        DataError: If no chat can be made of a context; see `context_roles`.
    """
    if problem := chat_problem(recipe):
        raise ConfigError(problem)
    if recipe.text.format == "chat" and len(reader):
        # Before encoders are loaded, as contexts of other samples are alike.
        context_roles(reader.read_json(0))
    if recipe.text.encode == "on_the_fly":
        return _encoding_dialogs(recipe, device)
    if not presets_of(recipe.backbone.name).stores_text:
        raise ConfigError(
            f"text.encode=stored: shards do not hold what the text encoders of "
            f"{recipe.backbone.name} give; use --set text.encode=on_the_fly"
        )
    has_latents = "text" in reader.manifest.arrays
    if has_latents and reader.manifest.format == 1:
        return StoredText
    # As the stored latents were encoded.
    precision = recipe.preprocess.encoder_precision if has_latents else "fp32"
    clip_text = load_clip_text(recipe.encoders, device, precision)
    check_encoder_hashes({"clip_text": clip_text.hash}, reader.manifest, reader.url)
    encode = _encoder_of_tokens(clip_text, recipe)
    if reader.manifest.format == 1:
        return partial(StoredTokens, encode=encode, empty_tokens=reader.empty_tokens)
    tokens = text_tokens("", recipe.text)
    empty = _first(encode(tokens[None]))
    expected = {"text": empty["text"].shape, "tokens": tokens.shape}
    _check_shape(reader, "text" if has_latents else "tokens", expected)
    if has_latents:
        return partial(StoredText, empty=empty)
    return partial(StoredTokens, encode=encode, empty_tokens=tokens)


def text_encoder_bytes(recipe: Recipe, *, has_latents: bool = True) -> int:
    """Return the bytes of the text encoders on the device of every rank while it trains.

    Args:
        recipe: Says whether text is read as stored, and by what it is encoded else.
        has_latents: True if the shards hold text latents.

    Raises:
        CheckpointError: If the configuration of an encoder cannot be read.
    """
    presets = presets_of(recipe.backbone.name)
    if recipe.text.encode == "stored" and has_latents:
        return 0
    if recipe.text.encode == "on_the_fly" and presets.pipeline:
        if recipe.train.text_encoder_memory == "free":
            return 0
        precision = recipe.train.text_encoder_precision
        return text_parts_bytes(recipe.backbone.weights or "", presets, precision)
    return clip_text_bytes(recipe.encoders.clip_text or "", recipe.encoders.text_prefix)


def _check_shape(reader: ShardReader, name: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
    found = reader.manifest.arrays[name].shape
    if found != shapes[name]:
        raise ConfigError(
            f"{reader.url}: got {name} {found}; expected {shapes[name]}, as encoders.clip_text and "
            "text.num_windows say; use those that prepared the data"
        )


def _encoding_dialogs(recipe: Recipe, device: str) -> OpenText:
    if presets_of(recipe.backbone.name).pipeline:
        return _encoding_by_pipeline(recipe, device)
    clip_text = load_clip_text(recipe.encoders, device)
    encode_tokens = _encoder_of_tokens(clip_text, recipe)

    def encode(lines: Sequence[str]) -> Encoded:
        return encode_tokens(np.stack([text_tokens(line, recipe.text) for line in lines]))

    encode_lines, empty = partial(_encode_lines, encode, recipe.text), _first(encode([""]))
    return lambda reader: DialogText(reader, encode_lines, empty)


def _encoding_by_pipeline(recipe: Recipe, device: str) -> OpenText:
    memory, size = recipe.train.text_encoder_memory, recipe.encoders.compute_batch_size

    def load() -> PipelineText:
        return PipelineText(
            recipe.backbone.weights or "",
            pipeline_family(recipe.backbone.name),
            recipe.text,
            size,
            device,
            recipe.train.text_encoder_precision,
            is_offloaded=memory == "offload",
            seed=recipe.train.seed,
        )

    def open_dialogs(reader: ShardReader, pipeline: PipelineText) -> DialogText:
        if recipe.text.format == "chat":
            encode = partial(_encode_chats, pipeline, recipe.text)
        else:
            encode = partial(_encode_lines, pipeline.encode, recipe.text)
        return DialogText(reader, encode, pipeline.encode_empty())

    if memory != "free":
        pipeline = load()
        return lambda reader: open_dialogs(reader, pipeline)

    opened: dict[str, EncodedOnce] = {}

    def open_once(reader: ShardReader) -> EncodedOnce:
        if reader.url not in opened:
            opened[reader.url] = EncodedOnce(
                lambda: open_dialogs(reader, load()), len(reader), size
            )
        return opened[reader.url]

    return open_once


def _encode_lines(
    encode: Callable[[Sequence[str]], Encoded], config: TextConfig, samples: Sequence[Sample]
) -> Encoded:
    return encode([context_text(_turns(sample), config) for sample in samples])


def _encode_chats(pipeline: PipelineText, config: TextConfig, samples: Sequence[Sample]) -> Encoded:
    chats = [context_messages(_turns(s), context_roles(s), config) for s in samples]
    return pipeline.encode_chats(chats, [str(sample["key"]) for sample in samples])


def _turns(sample: Sample) -> list[Turn]:
    return [Turn(turn["speaker"], turn["text"]) for turn in sample["context"]]


def _encoder_of_tokens(
    clip_text: ClipText, recipe: Recipe
) -> Callable[[NDArray[np.uint16]], Encoded]:
    """Return the latents that shards would hold: float16, at the fixed compute batch size."""

    def encode(tokens: NDArray[np.uint16]) -> Encoded:
        latents = clip_text.encode(tokens, recipe.encoders.compute_batch_size)
        return {"text": latents.astype(np.float16)}

    return encode


def _first(encoded: Encoded) -> Encoded:
    return {name: rows[0] for name, rows in encoded.items()}
