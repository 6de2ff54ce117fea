"""Shards of another autoencoder or text encoder are refused, by the sha256 of the weights."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from d2i.config import Recipe, apply_settings
from d2i.encoders import ClipText, Vae
from d2i.errors import CheckpointError
from d2i.recipes import load_recipe
from d2i.shards import ShardReader, write_manifest
from d2i.train.data.base_parts import check_base_parts
from tests.integration.pipelines import save_tiny_sd15
from tests.integration.training import write_split


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    places = [tmp_path_factory.mktemp("models") / name for name in ("first", "second")]
    for seed, place in enumerate(places):
        save_tiny_sd15(place, seed)
    return places


def recipe_of(base: Path, *settings: str) -> Recipe:
    recipe = load_recipe("sd15-lora-photochat")
    return apply_settings(recipe, [f"backbone.weights={base}", *settings])


def open_data(directory: Path, recipe: Recipe) -> ShardReader:
    """Write shards that name the recipe's encoders by the sha256 of their weights."""
    fingerprint: Any = {
        "image": {"vae": Vae(recipe.encoders.vae, "kl").hash},
        "text": {"clip_text": ClipText(recipe.encoders.clip_text).hash},
    }
    write_split(directory, "train", 4)
    write_manifest(str(directory), fingerprint)
    return ShardReader(str(directory))


def test_shards_of_own_parts_are_accepted_wherever_they_came_from(
    bases: list[Path], tmp_path: Path
) -> None:
    shutil.copytree(bases[0], tmp_path / "moved")
    reader = open_data(tmp_path / "data", recipe_of(bases[0]))
    check_base_parts(recipe_of(tmp_path / "moved"), reader)


@pytest.mark.parametrize("part", ["vae", "text_encoder"])
def test_shards_of_other_parts_are_refused(bases: list[Path], tmp_path: Path, part: str) -> None:
    other = tmp_path / "other"
    shutil.copytree(bases[0], other)
    shutil.rmtree(other / part)
    shutil.copytree(bases[1] / part, other / part)
    reader = open_data(tmp_path / "data", recipe_of(bases[0]))
    with pytest.raises(CheckpointError, match=f"its {part} has sha256 .*; expected .*--set"):
        check_base_parts(recipe_of(other), reader)


def test_latents_of_whole_clip_model_are_those_of_its_text_tower(
    bases: list[Path], tmp_path: Path
) -> None:
    tower = CLIPTextModel.from_pretrained(bases[0] / "text_encoder")
    whole = CLIPTextModelWithProjection(tower.config)
    whole.text_model.load_state_dict(getattr(tower, "text_model", tower).state_dict())
    whole.save_pretrained(tmp_path / "clip")
    setting = f"encoders.clip_text={tmp_path / 'clip'}"
    reader = open_data(tmp_path / "data", recipe_of(bases[0], setting))
    check_base_parts(recipe_of(bases[0], setting), reader)
    with pytest.raises(CheckpointError, match="its text_encoder has sha256"):
        check_base_parts(recipe_of(bases[0]), reader)
