"""Micro batches are the same from latents, token IDs and dialogs, with any number of threads."""

from __future__ import annotations

import threading
from dataclasses import fields
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from d2i.config import EncodersConfig, Recipe, TrainConfig, apply_settings
from d2i.encoders import ClipText
from d2i.models import family
from d2i.recipes import load_recipe
from d2i.shards import (
    Sample,
    ShardReader,
    json_bytes,
    npy_bytes,
    write_manifest,
    write_shard,
)
from d2i.tokenize import encode, window
from d2i.train.data.batch import Batch, BatchLoader
from d2i.train.data.data_order import DataOrder
from d2i.train.data.text_source import StoredTokens, build_text

LINES = [f"# i saw a {colour} ball # at night" for colour in ("red", "blue", "green", "pink")]
RECIPE = load_recipe("demo")
ENCODERS: EncodersConfig = RECIPE.encoders


@pytest.fixture(scope="module")
def readers(tmp_path_factory: pytest.TempPathFactory) -> tuple[ShardReader, ShardReader]:
    """Write the same samples with text latents, and with token IDs alone."""
    clip_text = ClipText(ENCODERS.clip_text)
    directories = []
    for members in (("tokens", "text"), ("tokens",)):
        directory = tmp_path_factory.mktemp("shards")
        random = np.random.default_rng(0)
        samples = []
        for number, line in enumerate(LINES):
            arrays = {"tokens": window(encode(line))}
            latents = clip_text.encode(arrays["tokens"][None], ENCODERS.compute_batch_size)
            arrays["text"] = latents[0].astype(np.float16)
            encoded = {
                "json": json_bytes({"context": [{"speaker": 0, "text": line}]}),
                "moments.npy": npy_bytes(random.standard_normal((8, 4, 4)).astype(np.float16)),
            }
            encoded |= {f"{name}.npy": npy_bytes(arrays[name]) for name in members}
            samples.append(Sample(f"train-{number}", encoded))
        write_shard(samples, str(directory), 0, failures={})
        empty = window(encode(""))
        (directory / "empty_tokens.npy").write_bytes(npy_bytes(empty))
        if "text" in members:
            latents = clip_text.encode(empty[None], ENCODERS.compute_batch_size)[0]
            (directory / "empty_text.npy").write_bytes(npy_bytes(latents.astype(np.float16)))
        write_manifest(str(directory), {})
        directories.append(directory)
    return ShardReader(str(directories[0])), ShardReader(str(directories[1]))


def config(num_threads: int = 1) -> TrainConfig:
    return TrainConfig(
        num_steps=4,
        global_batch_size=4,
        micro_batch_size=2,
        condition_dropout=0.4,
        num_reader_threads=num_threads,
    )


def stream(reader: ShardReader, num_threads: int, recipe: Recipe | None = None) -> list[Batch]:
    open_text = build_text(recipe or RECIPE, reader, "cpu")
    batches = BatchLoader(reader, config(num_threads), family("uvit"), open_text)
    order = DataOrder((len(reader),), 0)
    requests = [
        (indices, step) for step in range(4) for indices in order.micro_batches(step, 4, 0, 1, 2)
    ]
    found = list(batches.read_ahead(requests))
    batches.close()
    return found


def check_same(ours: list[Batch], theirs: list[Batch]) -> None:
    assert len(ours) == len(theirs) == 8
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys == other.keys
        for field in fields(Batch):
            if field.name != "keys":
                value, expected = getattr(one, field.name), getattr(other, field.name)
                torch.testing.assert_close(value, expected, rtol=0, atol=0)


def test_dialogs_encoded_while_training_equal_stored_text_latents(
    readers: tuple[ShardReader, ShardReader],
) -> None:
    recipe = apply_settings(RECIPE, ["text.encode=on_the_fly", "text.strategy={text}"])
    for reader in readers:
        check_same(stream(reader, 2, recipe), stream(readers[0], 1))
    other = stream(readers[0], 1, apply_settings(recipe, ["text.strategy=hash"]))
    same = [
        torch.equal(one.conditions["text"], two.conditions["text"])
        for one, two in zip(other, stream(readers[0], 1), strict=True)
    ]
    assert not all(same)


def test_encoded_token_ids_equal_stored_text_latents(
    readers: tuple[ShardReader, ShardReader],
) -> None:
    with_latents, with_tokens = readers
    assert "text" not in with_tokens.manifest.arrays
    found = stream(with_tokens, 1)
    check_same(found, stream(with_latents, 1))
    # Some conditions are dropped in these batches, and some are not.
    empty = torch.tensor(with_latents.empty_text)
    dropped = [torch.equal(row, empty) for batch in found for row in batch.conditions["text"]]
    assert 0 < sum(dropped) < len(dropped)


def in_format_2(reader: ShardReader, directory: Path) -> ShardReader:
    """Write the samples of a data set in format 2, which stores nothing of the empty text."""
    made_by = {"sha256": "0" * 64}
    arrays = {
        name: {"dtype": array.dtype, "shape": list(array.shape), "encoder": "any"}
        for name, array in reader.manifest.arrays.items()
    }
    fingerprint = {"format": 2, "arrays": arrays, "encoders": {"any": made_by}}
    samples = [Sample(key, reader.read_members(n)) for n, key in enumerate(reader.keys)]
    write_shard(samples, str(directory), 0, failures={}, fingerprint=fingerprint)
    write_manifest(str(directory), fingerprint)
    return ShardReader(str(directory))


def test_batches_are_equal_for_both_formats(
    readers: tuple[ShardReader, ShardReader], tmp_path: Path
) -> None:
    for number, reader in enumerate(readers):
        check_same(stream(in_format_2(reader, tmp_path / str(number)), 1), stream(reader, 1))


@pytest.mark.parametrize("num_threads", [2, 5])
def test_batches_are_equal_for_any_number_of_threads(
    readers: tuple[ShardReader, ShardReader], num_threads: int
) -> None:
    check_same(stream(readers[0], num_threads), stream(readers[0], 1))


def test_first_unread_follows_returned_batches(readers: tuple[ShardReader, ShardReader]) -> None:
    """Prefetch starts at the first unread step, and eviction frees the shards before it."""
    reader, gate = readers[1], threading.Event()
    delayed_tokens = reader.read(np.array([2]), members=["tokens"])["tokens"]

    def encode(tokens: NDArray[np.uint16]) -> dict[str, NDArray[np.float16]]:
        if np.array_equal(tokens, delayed_tokens):
            gate.wait()
        return {"text": np.zeros((*tokens.shape, 8), np.float16)}

    open_text = partial(StoredTokens, encode=encode, empty_tokens=reader.empty_tokens)
    batches = BatchLoader(reader, config(2), family("uvit"), open_text)
    prefetched = batches.read_ahead((np.array([step]), step) for step in range(4))
    assert batches.first_unread(0) == 0
    next(prefetched)
    next(prefetched)
    assert batches.first_unread(1) == 2
    gate.set()
    next(prefetched)
    assert batches.first_unread(2) == 3
    batches.close()
