"""Settings are validated, and a wrong one is a one-line error."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from d2i.backbones import chat_problem
from d2i.config import Recipe, apply_settings, load_config
from d2i.errors import ConfigError
from d2i.recipes import RECIPES, load_recipe, read_stored_recipe, store_recipe


def test_apply_settings_replaces_and_converts_values() -> None:
    recipe = apply_settings(load_recipe("demo"), ["train.optim.lr=1e-4", "text.strategy=space"])
    assert recipe.train.optim.lr == 1e-4
    assert recipe.text.strategy == "space"


@pytest.mark.parametrize(
    ("setting", "hint"),
    [
        ("train.optim.lrr=1", "did you mean 'lr'?"),
        ("train.num_steps=abc", "valid integer"),
        ("train.num_steps", "expected NAME=VALUE"),
        ("train.num_steps.x=1", "not a group"),
        ("image.resolution=7", "multiple of 8"),
        ("nothing_like_it=1", "its fields are"),
        ("fetch.contact=\u0141ukasz <l@example.org>", "one line of ASCII"),
        ("fetch.contact=l@example.org\nX-Forwarded-For: 1", "one line of ASCII"),
        ("fetch.contact=l@example.org\x7f", "one line of ASCII"),
    ],
)
def test_wrong_setting_is_one_line_error(setting: str, hint: str) -> None:
    with pytest.raises(ConfigError, match="--set") as caught:
        apply_settings(load_recipe("demo"), [setting])
    assert hint in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("path", "value", "reason"),
    [
        ("train.optim.name", "adamw8bit", "d2i trains with AdamW only"),
        ("train.optim.type", "lion", "d2i trains with AdamW only"),
        ("train.optimizer", "prodigy", "d2i trains with AdamW only"),
        ("backbone.quantize", "nf4", "quantised base models are not supported yet"),
        ("backbone.quantization", "int8", "quantised base models are not supported yet"),
        ("backbone.load_in_4bit", "yes", "quantised base models are not supported yet"),
    ],
)
def test_unsupported_setting_is_refused_by_name(
    tmp_path: Path, path: str, value: str, reason: str
) -> None:
    values = load_recipe("sd15-lora-photochat").model_dump(mode="json")
    *groups, leaf = path.split(".")
    group = values
    for name in groups:
        group = group[name]
    group[leaf] = value
    as_json = tmp_path / "own.json"
    as_json.write_text(json.dumps(values))
    as_toml = tmp_path / "own.toml"
    as_toml.write_text(f"name = 'own'\nbackbone.name = 'sd15'\n{path} = '{value}'\n")
    for load in (
        lambda: apply_settings(load_recipe("sd15-lora-photochat"), [f"{path}={value}"]),
        lambda: load_recipe(str(as_json)),
        lambda: load_recipe(str(as_toml)),
    ):
        with pytest.raises(ConfigError) as caught:
            load()
        message = str(caught.value)
        assert f"{path}: got '{value}'; {reason}" in message
        assert "leave it out" in message
        assert "\n" not in message


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_json_round_trip(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    assert Recipe.model_validate(json.loads(recipe.model_dump_json())) == recipe
    store_recipe(recipe, str(tmp_path))
    assert read_stored_recipe(str(tmp_path)) == recipe
    assert str(Path.home()) not in recipe.model_dump_json()


def test_recipes_match_paper_resolution_and_batch_size() -> None:
    table_5 = {
        "uvit-s-photochat": (256, 740),
        "uvit-s-deep-photochat": (256, 512),
        "unidiffuser-v1-photochat": (512, 260),
        "uvit-s-mmdialog": (256, 4096),
        "uvit-s-deep-mmdialog": (256, 4096),
        "unidiffuser-v1-mmdialog": (512, 800),
    }
    for name, numbers in table_5.items():
        recipe = load_recipe(name)
        assert (recipe.image.resolution, recipe.train.global_batch_size) == numbers
        optim = recipe.train.optim
        assert (optim.lr, optim.weight_decay, optim.betas) == (3e-5, 0.03, (0.9, 0.9))


def test_load_recipe_accepts_module_and_function() -> None:
    assert load_recipe("d2i.recipes:demo") == load_recipe("demo")
    with pytest.raises(ConfigError, match="importable"):
        load_recipe("no.such.module:recipe")
    with pytest.raises(ConfigError, match="did you mean 'demo'"):
        load_recipe("demoo")


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_accumulation_keeps_global_batch_for_any_world_size(world_size: int) -> None:
    train = load_recipe("uvit-s-mmdialog").train
    micro, num_micro = train.accumulation(world_size)
    assert micro <= train.micro_batch_size
    assert micro * num_micro * world_size == train.global_batch_size


def test_accumulation_rejects_indivisible_world_size() -> None:
    with pytest.raises(ConfigError, match="cannot split evenly"):
        load_recipe("demo").train.accumulation(7)


def test_backward_compatibility_of_fp16_run_config() -> None:
    values = load_recipe("uvit-s-mmdialog").model_dump(mode="json")
    values["train"]["precision"] = "fp16"
    assert load_config(Recipe, values, source="config.json").train.precision == "fp16_weights"


@pytest.mark.parametrize(
    ("name", "settings", "hint"),
    [
        ("z-image-lora-photochat", ["text.format=chat"], None),
        ("flux2-klein-lora-photochat", ["text.format=chat", "text.roles=permuted"], None),
        ("sana-photochat", [], None),
        ("sana-photochat", ["text.format=chat"], "sana has no chat template; expected text.format"),
        ("demo", ["text.format=chat"], "uvit-s has no chat template; .* z-image, flux2-klein"),
        ("z-image-lora-photochat", ["text.roles=permuted"], "expected text.format=chat"),
        (
            "z-image-lora-photochat",
            ["text.format=chat", "corpus.direction=first"],
            "expected corpus.direction=answer",
        ),
    ],
)
def test_chat_is_refused_where_no_encoder_reads_it(
    name: str, settings: list[str], hint: str | None
) -> None:
    problem = chat_problem(apply_settings(load_recipe(name), settings))
    assert (problem is None) == (hint is None)
    if hint:
        assert re.search(hint, str(problem))
        assert "\n" not in str(problem)


def test_chat_is_encoded_while_training() -> None:
    settings = ["text.format=chat", "encoders.clip_text=openai/clip", "text.encode=stored"]
    recipe = apply_settings(load_recipe("flux2-klein-lora-photochat"), settings)
    assert "expected text.encode=on_the_fly" in str(chat_problem(recipe))
