"""Shards that hold other arrays than a network is trained on are refused before training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from d2i.encoders import ClipText
from d2i.errors import ConfigError, D2IError
from d2i.recipes import change_recipe, load_recipe
from d2i.shards import Sample, ShardReader, json_bytes, npy_bytes, write_manifest, write_shard
from d2i.train.data.loader import check_arrays
from d2i.train.data.text_source import build_text
from tests.samples import metadata

RECIPE = load_recipe("demo")
USUAL = {
    "moments": ("float16", (8, 4, 4), "vae"),
    "tokens": ("uint16", (77,), "tokenizer"),
}
TEXT = ("float16", (77, 64), "clip_text")
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no latents": ({"moments": None}, "got no latents of a known codec"),
    "another dtype": ({"moments": ("bfloat16", (8, 4, 4), "vae")}, "got bfloat16 moments"),
    "another autoencoder's channels": (
        {"moments": ("float16", (32, 4, 4), "vae")},
        r"got latents of kl-f8c16, .*\(32, 4, 4\).*; expected moments of kl-f8c4, on which uvit-s",
    ),
    "FLUX.2's autoencoder": (
        {"moments": ("float16", (64, 4, 4), "vae")},
        "got latents of flux2, .* expected moments of kl-f8c4",
    ),
    "an autoencoder without a variance": (
        {"moments": None, "latent": ("float16", (32, 1, 1), "vae")},
        "got latents of dc-ae-f32, .* expected moments of kl-f8c4",
    ),
    "no text": ({"tokens": None}, r"got no tokens; .* --set text\.encode=on_the_fly"),
    "ids of a larger vocabulary": (
        {"tokens": ("uint32", (77,), "tokenizer")},
        "got uint32 tokens; expected uint16",
    ),
    "other windows": ({"tokens": ("uint16", (154,), "tokenizer")}, r"got tokens \(154,\)"),
    "bits as text": ({"text": ("bfloat16", (77, 64), "clip_text")}, "got bfloat16 text"),
    "text of another encoder": ({"text": ("float16", (77, 64), "t5")}, "text of the encoder 't5'"),
    "text of another size": ({"text": ("float16", (512, 64), "clip_text")}, r"text \(512, 64\)"),
}


def write_data(directory: Path, arrays: dict[str, Any]) -> ShardReader:
    arrays = {name: value for name, value in arrays.items() if value is not None}
    declared = {
        name: {"dtype": dtype, "shape": list(shape), "encoder": encoder}
        for name, (dtype, shape, encoder) in arrays.items()
    }
    own = ClipText(RECIPE.encoders.clip_text).hash
    weights = {"clip_text": own}
    encoders = {e: {"sha256": weights.get(e, "0" * 64)} for _, _, e in arrays.values()}
    fingerprint = {"format": 2, "arrays": declared, "encoders": encoders}
    members = {
        f"{name}.npy": npy_bytes(np.zeros(shape, "uint16" if dtype == "bfloat16" else dtype))
        for name, (dtype, shape, _) in arrays.items()
    }
    sample = Sample("train-0", {"json": json_bytes(metadata("train-0")), **members})
    write_shard([sample], str(directory), 0, failures={}, fingerprint=fingerprint)
    write_manifest(str(directory), fingerprint)
    return ShardReader(str(directory))


def check(reader: ShardReader) -> None:
    check_arrays(RECIPE, reader)
    build_text(RECIPE, reader, "cpu")


@pytest.mark.parametrize("case", BAD)
def test_other_arrays_are_refused(case: str, tmp_path: Path) -> None:
    changes, message = BAD[case]
    reader = write_data(tmp_path, USUAL | changes)
    with pytest.raises(ConfigError, match=message):
        check(reader)


@pytest.mark.parametrize("backbone", ["unidiffuser-v1", "sd15", "sdxl"])
def test_every_family_refuses_latents_of_another_codec(backbone: str, tmp_path: Path) -> None:
    reader = write_data(tmp_path, USUAL | {"moments": ("float16", (32, 4, 4), "vae")})
    recipe = change_recipe(RECIPE, [f"backbone.name={backbone}", "text.encode=on_the_fly"])
    with pytest.raises(ConfigError, match=f"latents of kl-f8c16, .* on which {backbone} is"):
        check_arrays(recipe, reader)


@pytest.mark.parametrize("more", [{}, {"text": TEXT}, {"mask": ("uint32", (9,), "t5")}])
def test_expected_arrays_are_accepted(more: dict[str, Any], tmp_path: Path) -> None:
    check(write_data(tmp_path, USUAL | more))


def test_text_is_not_needed_where_it_is_encoded_while_training(tmp_path: Path) -> None:
    reader = write_data(tmp_path, {**USUAL, "tokens": None})
    check_arrays(change_recipe(RECIPE, ["text.encode=on_the_fly"]), reader)


def test_empty_data_set_is_refused(tmp_path: Path) -> None:
    write_manifest(str(tmp_path), {})
    with pytest.raises(D2IError, match="has no samples"):
        check_arrays(RECIPE, ShardReader(str(tmp_path)))
