"""Golden files of every recipe with all its settings, so that a changed default shows."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from d2i.errors import ConfigError
from d2i.recipes import RECIPES, change_recipe, load_recipe, resolve_recipe
from d2i.train.distributed.engine import read_zero
from tests.shared import SHARED, needs_shared

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden" / "recipes"
TABLE_5 = {
    "uvit-s": "U-ViT-Small",
    "uvit-s-deep": "U-ViT-Small(Deep)",
    "unidiffuser-v1": "UniDiffuser-v1",
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_matches_golden_file(name: str) -> None:
    assert (GOLDEN / f"{name}.json").read_text() == load_recipe(name).model_dump_json(
        indent=1
    ) + "\n"


def test_every_golden_file_belongs_to_recipe() -> None:
    assert {path.stem for path in GOLDEN.glob("*.json")} == set(RECIPES)


@needs_shared
@pytest.mark.parametrize("corpus", ["photochat", "mmdialog"])
@pytest.mark.parametrize("backbone", TABLE_5)
def test_recipe_matches_paper_hyperparameters(corpus: str, backbone: str) -> None:
    paper = json.loads((SHARED / "reference" / "paper.json").read_text())
    recipe = load_recipe(f"{backbone}-{corpus}")
    resolution, batch, devices = paper["table5"][corpus][TABLE_5[backbone]]
    assert (recipe.image.resolution, recipe.train.global_batch_size) == (resolution, batch)
    optim = recipe.train.optim
    assert optim.lr == paper["optimizer"]["lr"]
    assert optim.weight_decay == paper["optimizer"]["weight_decay"]
    assert list(optim.betas) == paper["optimizer"]["betas"]
    assert recipe.train.precision == "bf16"
    assert recipe.sample.num_steps == paper["sampler"]["steps"]
    # The batch divides by the paper's number of devices.
    recipe.train.accumulation(int(devices.partition("x")[0]))


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_has_training_script(name: str) -> None:
    script = ROOT / "train" / f"{name}.sh"
    assert os.access(script, os.X_OK)
    without = subprocess.run([script], capture_output=True, text=True, check=False)
    assert without.returncode != 0
    assert "usage: " in without.stderr
    assert re.search(rf"--recipe {name} ", script.read_text())


@pytest.mark.parametrize("stage", range(4))
def test_zero_file_sets_its_stage(stage: int) -> None:
    assert read_zero(ROOT / "train" / f"zero-{stage}.json")["stage"] == stage


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"zero_optimization": {"stage": 7}}',
        '{"zero_optimization": {"stage": 1}, "train_batch_size": 4}',
    ],
)
def test_read_zero_rejects_invalid_files(tmp_path: Path, content: str) -> None:
    (tmp_path / "zero.json").write_text(content)
    with pytest.raises(ConfigError, match="--zero"):
        read_zero(tmp_path / "zero.json")


def test_joint_loss_has_no_condition_dropout() -> None:
    recipe = load_recipe("unidiffuser-v1-photochat")
    assert (recipe.train.condition_dropout, recipe.sample.unconditional) == (0, "true_uncond")
    assert load_recipe("uvit-s-photochat").train.condition_dropout == 0.1


def test_t2i_loss_sets_condition_dropout_and_empty_token() -> None:
    recipe = resolve_recipe("unidiffuser-v1-photochat", ["train.unidiffuser.loss=t2i"])
    assert (recipe.train.condition_dropout, recipe.sample.unconditional) == (0.1, "empty_token")
    back = change_recipe(recipe, ["train.unidiffuser.loss=joint"])
    assert (back.train.condition_dropout, back.sample.unconditional) == (0, "true_uncond")


def test_explicit_condition_dropout_overrides_loss_default() -> None:
    settings = ["train.condition_dropout=0.3", "train.unidiffuser.loss=joint"]
    assert resolve_recipe("unidiffuser-v1-mmdialog", settings).train.condition_dropout == 0.3


def test_joint_loss_rejects_empty_token_without_dropout() -> None:
    settings = ["sample.unconditional=empty_token"]
    with pytest.raises(ConfigError, match=r"never trains on without train\.condition_dropout"):
        resolve_recipe("unidiffuser-v1-photochat", settings)
    recipe = resolve_recipe("unidiffuser-v1-photochat", [*settings, "train.condition_dropout=0.1"])
    assert recipe.sample.unconditional == "empty_token"
