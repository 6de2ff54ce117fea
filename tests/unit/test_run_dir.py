"""Settings that a resumed run may change, and those that it rejects."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from d2i.errors import CheckpointError, ConfigError
from d2i.recipes import resolve_recipe
from d2i.run_dir import RunConfig, check_initial_weights, read_recipe, start_or_resume


def start_run(run: Path, *settings: str, data: str = "a" * 64, is_begun: bool = True) -> None:
    recipe = resolve_recipe("uvit-s-photochat", settings).model_dump(mode="json")
    start_or_resume(str(run), RunConfig(recipe, "data", data, 2), is_begun=is_begun)


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
def test_resume_accepts_settings_that_change_no_numbers(tmp_path: Path, setting: str) -> None:
    """Out-of-memory advice is to lower the first ones and resume."""
    start_run(tmp_path)
    start_run(tmp_path, f"train.{setting}")
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
def test_resume_rejects_settings_that_change_numbers(tmp_path: Path, setting: str) -> None:
    start_run(tmp_path)
    name, _, value = setting.partition("=")
    with pytest.raises(CheckpointError, match=f"recipe.{name}: {value}, expected "):
        start_run(tmp_path, setting)


def test_resume_rejects_other_data(tmp_path: Path) -> None:
    start_run(tmp_path)
    with pytest.raises(CheckpointError, match="manifest_sha256: bbb"):
        start_run(tmp_path, data="b" * 64)


def test_run_without_weights_restarts_with_new_settings(tmp_path: Path) -> None:
    start_run(tmp_path)
    start_run(tmp_path, "train.optim.lr=0.5", is_begun=False)
    assert read_recipe(str(tmp_path)).train.optim.lr == 0.5


def test_fine_tuning_without_initial_weights_is_one_line_error(tmp_path: Path) -> None:
    recipe = resolve_recipe("uvit-s-deep-photochat", [])
    with pytest.raises(ConfigError) as caught:
        check_initial_weights(recipe, str(tmp_path))
    line = str(caught.value)
    assert "\n" not in line
    for part in ("mscoco_uvit_small_deep.pth", "github.com/baofff/U-ViT", "backbone.weights=PATH"):
        assert part in line


@pytest.mark.parametrize("weights", ["scratch", "nnet.pth"])
def test_explicit_initial_weights_or_scratch_are_accepted(tmp_path: Path, weights: str) -> None:
    recipe = resolve_recipe("uvit-s-photochat", [f"backbone.weights={weights}"])
    check_initial_weights(recipe, str(tmp_path))
    assert recipe.backbone.is_random == (weights == "scratch")


def test_resume_needs_no_initial_weights_if_run_began_without(tmp_path: Path) -> None:
    start_run(tmp_path)
    check_initial_weights(resolve_recipe("uvit-s-photochat", []), str(tmp_path))


def test_resume_without_initial_weights_of_run_is_rejected(tmp_path: Path) -> None:
    start_run(tmp_path, "backbone.weights=nnet.pth")
    with pytest.raises(ConfigError, match=r"got no backbone\.weights"):
        check_initial_weights(resolve_recipe("uvit-s-photochat", []), str(tmp_path))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_backward_compatibility_resumes_old_half_precision_run(
    tmp_path: Path, precision: str
) -> None:
    """Both once meant the whole network in half precision, before the EMA had a warm-up."""
    start_run(tmp_path)
    document = json.loads((tmp_path / "config.json").read_text())
    train = document["recipe"]["train"]
    train["precision"] = precision
    for name in ("ema_warmup", "short_ema_length"):
        del train[name]
    (tmp_path / "config.json").write_text(json.dumps(document))
    (tmp_path / "config.json.sha256").unlink()
    with pytest.raises(CheckpointError) as caught:
        start_run(tmp_path)
    old_settings = re.findall(r"--set (\S+?)[ )]", str(caught.value).replace(") or", " ) or"))
    assert f"train.precision={precision}_weights" in old_settings
    start_run(tmp_path, *old_settings)
