"""What a run may go on with, and what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from d2i.errors import CheckpointError, ConfigError
from d2i.recipes import resolve_recipe
from d2i.run_dir import RunConfig, check_initial_weights, open_run, read_recipe


def begun(run: Path, *settings: str, data: str = "a" * 64, is_begun: bool = True) -> None:
    recipe = resolve_recipe("uvit-s-photochat", settings).model_dump(mode="json")
    open_run(str(run), RunConfig(recipe, "data", data, 2), is_begun=is_begun)


@pytest.mark.parametrize(
    "setting",
    [
        "micro_batch_size=64",
        "zero_stage=3",
        "activation_checkpointing=true",
        "compile=true",
        "num_checkpoint_steps=7",
        "num_log_steps=1",
        "record_keys=true",
        "wandb_project=chats",
    ],
)
def test_what_changes_no_number_may_change(tmp_path: Path, setting: str) -> None:
    """Whoever is out of memory is told to lower the first ones, and goes on."""
    begun(tmp_path)
    begun(tmp_path, f"train.{setting}")
    assert read_recipe(str(tmp_path)) == resolve_recipe("uvit-s-photochat", [])


@pytest.mark.parametrize(
    "setting",
    [
        "train.global_batch_size=370",
        "train.optim.lr=0.001",
        "train.precision=fp32",
        "train.order=blocked",
        "train.ema_rate=0.9",
        "text.strategy=space",
    ],
)
def test_what_changes_a_number_is_refused(tmp_path: Path, setting: str) -> None:
    begun(tmp_path)
    name, _, value = setting.partition("=")
    with pytest.raises(CheckpointError, match=f"recipe.{name}: {value}, expected "):
        begun(tmp_path, setting)


def test_other_data_is_refused(tmp_path: Path) -> None:
    begun(tmp_path)
    with pytest.raises(CheckpointError, match="manifest_sha256: bbb"):
        begun(tmp_path, data="b" * 64)


def test_what_has_no_weights_yet_is_begun_anew(tmp_path: Path) -> None:
    begun(tmp_path)
    begun(tmp_path, "train.optim.lr=0.5", is_begun=False)
    assert read_recipe(str(tmp_path)).train.optim.lr == 0.5


def test_a_recipe_that_fine_tunes_asks_for_its_weights(tmp_path: Path) -> None:
    recipe = resolve_recipe("uvit-s-deep-photochat", [])
    with pytest.raises(ConfigError) as refused:
        check_initial_weights(recipe, str(tmp_path))
    line = str(refused.value)
    assert "\n" not in line
    for said in ("mscoco_uvit_small_deep.pth", "github.com/baofff/U-ViT", "backbone.weights=PATH"):
        assert said in line


@pytest.mark.parametrize("weights", ["scratch", "nnet.pth"])
def test_who_says_what_to_start_from_may_start(tmp_path: Path, weights: str) -> None:
    recipe = resolve_recipe("uvit-s-photochat", [f"backbone.weights={weights}"])
    check_initial_weights(recipe, str(tmp_path))
    assert recipe.backbone.is_random == (weights == "scratch")


def test_a_run_begun_without_being_asked_goes_on(tmp_path: Path) -> None:
    begun(tmp_path)
    check_initial_weights(resolve_recipe("uvit-s-photochat", []), str(tmp_path))


def test_a_run_begun_from_a_file_is_not_repeated_without_it(tmp_path: Path) -> None:
    begun(tmp_path, "backbone.weights=nnet.pth")
    with pytest.raises(ConfigError, match=r"got no backbone\.weights"):
        check_initial_weights(resolve_recipe("uvit-s-photochat", []), str(tmp_path))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_run_in_half_precision_goes_on_as_it_was_begun(tmp_path: Path, precision: str) -> None:
    """Both were the whole network in half precision, before averages had a warm-up."""
    begun(tmp_path)
    kept = json.loads((tmp_path / "config.json").read_text())
    train = kept["recipe"]["train"]
    train["precision"] = precision
    for name in ("ema_warmup", "short_ema_length"):
        del train[name]
    (tmp_path / "config.json").write_text(json.dumps(kept))
    (tmp_path / "config.json.sha256").unlink()
    with pytest.raises(CheckpointError) as refused:
        begun(tmp_path)
    former = re.findall(r"--set (\S+?)[ )]", str(refused.value).replace(") or", " ) or"))
    assert f"train.precision={precision}_weights" in former
    begun(tmp_path, *former)
