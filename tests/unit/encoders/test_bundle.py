"""Data is read with the encoders that made it, wherever their weights are stored now."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from d2i.encoders import Encoders, load_encoders
from d2i.encoders.data_fingerprint import check_encoder_hashes, make_fingerprint
from d2i.errors import CheckpointError
from d2i.eval.system import SystemSpec
from d2i.eval.worker import EvalWorker, EvalWorkerBuilder
from d2i.recipes import load_recipe
from d2i.shards import ShardReader, write_manifest
from d2i.train.data.text_source import StoredText, build_text
from d2i.train.monitor.sample_grid import SampleGrid

RECIPE = load_recipe("demo")


@pytest.fixture(scope="module")
def encoders() -> Encoders:
    return load_encoders(RECIPE.encoders)


def evaluate(reader: ShardReader, encoders: Encoders) -> Any:
    system = SystemSpec("images:unused", "unused")
    builder = EvalWorkerBuilder(RECIPE, system, reader.url, "unused", "full", "none")
    return EvalWorker(builder, encoders, "cpu")


USES: dict[str, tuple[str, Callable[[ShardReader, Encoders], Any]]] = {
    "training text": (
        "clip_text",
        lambda reader, _: build_text(RECIPE, reader, "cpu"),
    ),
    "sample grid": (
        "vae",
        lambda reader, _: SampleGrid(RECIPE, reader, torch.device("cpu"), StoredText(reader)),
    ),
    "evaluation": ("clip_image", evaluate),
}


@pytest.mark.parametrize("use", USES)
def test_encoder_weights_must_match_data(use: str, encoders: Encoders, tmp_path: Path) -> None:
    """Also if the recipe names them by a path, which does not identify the weights."""
    name, load = USES[use]
    made_by = make_fingerprint(RECIPE, encoders)
    check_encoder_hashes(encoders.hashes(), write_manifest(str(tmp_path), made_by), str(tmp_path))
    made_by["text" if name == "clip_text" else "image"][name] = "0" * 64
    write_manifest(str(tmp_path), made_by)
    with pytest.raises(CheckpointError, match=rf"encoders\.{name}: .* expected 0000000000000000…"):
        load(ShardReader(str(tmp_path)), encoders)


def test_foreign_shards_skip_encoder_check(encoders: Encoders, tmp_path: Path) -> None:
    manifest = write_manifest(str(tmp_path), {"image": "another program's"})
    check_encoder_hashes(encoders.hashes(), manifest, str(tmp_path))
