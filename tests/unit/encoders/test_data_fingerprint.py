"""The fingerprint of a data set says the same in both formats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from d2i.encoders import Encoders, load_encoders
from d2i.encoders.data_fingerprint import (
    check_encoder_hashes,
    encoder_sha256,
    image_arrays,
    image_part,
    make_fingerprint,
)
from d2i.errors import CheckpointError
from d2i.recipes import change_recipe, load_recipe
from d2i.shards import ArrayInfo, DeclaredArray, write_manifest

RECIPE = load_recipe("demo")
RECIPE_2 = change_recipe(RECIPE, ["preprocess.format=2"])
NAMES: tuple[Any, ...] = ("vae", "clip_image", "clip_text")


@pytest.fixture(scope="module")
def encoders() -> Encoders:
    return load_encoders(RECIPE.encoders)


def test_both_formats_name_the_same_weights_and_images(encoders: Encoders) -> None:
    first, second = (make_fingerprint(recipe, encoders) for recipe in (RECIPE, RECIPE_2))
    assert "format" not in first
    assert second["format"] == 2
    for name in NAMES:
        expected = encoders.hashes()[name]
        assert encoder_sha256(first, name) == encoder_sha256(second, name) == expected
    declared = encoders.arrays(RECIPE.image, RECIPE.text)
    plain = {n: ArrayInfo(dtype=a.dtype, shape=a.shape) for n, a in declared.items()}
    assert image_arrays(declared) == image_arrays(plain) == ["moments", "clip"]
    part = image_part(first, plain)
    assert part == image_part(second, declared)
    assert part["arrays"]["moments"] == ["float16", *declared["moments"].shape]
    coarse = {**plain, "clip": ArrayInfo(dtype="float16", shape=(7,))}
    assert image_part(first, coarse) != part


@pytest.mark.parametrize("recipe", [RECIPE, RECIPE_2], ids=["format 1", "format 2"])
def test_format_of_text_changes_no_data(encoders: Encoders, recipe: Any) -> None:
    chat = change_recipe(recipe, ["text.format=chat", "text.roles=permuted"])
    assert make_fingerprint(chat, encoders) == make_fingerprint(recipe, encoders)
    assert not {"format", "roles"} & make_fingerprint(chat, encoders)["text"].keys()


def test_arrays_that_format_1_cannot_hold_are_declared(
    encoders: Encoders, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = DeclaredArray(dtype="float16", shape=(32, 4, 4), encoder="vae")
    monkeypatch.setattr(Encoders, "arrays", lambda *_: {"moments": wide})
    assert make_fingerprint(RECIPE, encoders)["arrays"] == {
        "moments": {"dtype": "float16", "shape": [32, 4, 4], "encoder": "vae"}
    }


@pytest.mark.parametrize("recipe", [RECIPE, RECIPE_2], ids=["format 1", "format 2"])
@pytest.mark.parametrize("name", NAMES)
def test_other_weights_are_refused(
    name: Any, recipe: Any, encoders: Encoders, tmp_path: Path
) -> None:
    manifest = write_manifest(str(tmp_path), make_fingerprint(recipe, encoders))
    check_encoder_hashes(encoders.hashes(), manifest, "data")
    with pytest.raises(CheckpointError, match=rf"encoders\.{name}: got .* 0000000000000000…"):
        check_encoder_hashes({name: "0" * 64}, manifest, "data")


@pytest.mark.parametrize("odd", [None, "", 5])
def test_odd_value_in_place_of_weights_is_refused(odd: Any, tmp_path: Path) -> None:
    manifest = write_manifest(str(tmp_path), {"image": {"vae": odd}})
    with pytest.raises(CheckpointError, match=r"encoders\.vae"):
        check_encoder_hashes({"vae": "0" * 64}, manifest, "data")
    check_encoder_hashes({"clip_text": "0" * 64}, manifest, "data")
