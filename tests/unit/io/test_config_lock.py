"""The settings of a directory are locked at first use, and a directory has one writer."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from d2i.config import TextConfig
from d2i.demo.corpus import write_corpus
from d2i.errors import ConfigError
from d2i.io import storage
from d2i.io.config_lock import lock_or_diff
from d2i.preprocess.job_files import JobFiles
from d2i.preprocess.plan.planner import PlanRequest, make_plan
from d2i.recipes import change_recipe, check_prepared_with, load_recipe, store_recipe
from d2i.shards import Sample, json_bytes, npy_bytes, write_shard


def test_lock_or_diff_keeps_first_settings_and_lists_changes(tmp_path: Path) -> None:
    url = str(tmp_path / "kept.json")
    assert lock_or_diff(url, {"image": {"resolution": 64}, "pair": (1, 2)}) == []
    assert lock_or_diff(url, {"image": {"resolution": 64}, "pair": (1, 2)}) == []
    assert lock_or_diff(url, {"image": {"resolution": 32}, "more": 1}) == [
        "image.resolution: 32, expected 64",
        "more: 1, expected absent",
        "pair: absent, expected [1, 2]",
    ]


@pytest.mark.parametrize("content", ["{", "[1]"])
def test_lock_or_diff_raises_for_damaged_file(tmp_path: Path, content: str) -> None:
    (tmp_path / "kept.json").write_text(content)
    with pytest.raises(ConfigError, match="is damaged"):
        lock_or_diff(str(tmp_path / "kept.json"), {})


def test_exclusive_lock_lets_one_writer_work(tmp_path: Path) -> None:
    with ExitStack() as held:
        held.enter_context(storage.exclusive_lock(str(tmp_path)))
        held.enter_context(storage.exclusive_lock(str(tmp_path / "other")))
        with pytest.raises(ConfigError, match="locked by another d2i process"):
            held.enter_context(storage.exclusive_lock(str(tmp_path), wait_s=0))
    with storage.exclusive_lock(str(tmp_path)):
        pass


@pytest.fixture
def request_(tmp_path: Path) -> PlanRequest:
    write_corpus(tmp_path / "corpus", 50, seed=0)
    return PlanRequest("mmdialog", str(tmp_path / "corpus"), "test", load_recipe("demo"))


def test_make_plan_without_keep_writes_nothing(tmp_path: Path, request_: PlanRequest) -> None:
    plan = make_plan(request_, str(tmp_path / "out"), keep=False)
    assert plan.num_instances >= 6
    assert not (tmp_path / "out").exists()


def test_plan_is_locked_by_first_finished_shard(tmp_path: Path, request_: PlanRequest) -> None:
    out = str(tmp_path / "out")
    make_plan(replace(request_, limit=2), out)
    assert make_plan(replace(request_, limit=3), out).num_instances == 3
    assert make_plan(replace(request_, limit=3), out).num_instances == 3
    sample = Sample("k", {"json": json_bytes({"key": "k"}), "tokens.npy": _tokens()})
    write_shard([sample], out, 0, failures={})
    with pytest.raises(ConfigError, match=r"got limit: 2, expected 3"):
        make_plan(replace(request_, limit=2), out)


def test_plan_without_limit_on_upscaling_is_that_of_earlier_versions(
    tmp_path: Path, request_: PlanRequest
) -> None:
    out = str(tmp_path / "out")
    plan = make_plan(request_, out)
    assert set(plan.decided_by["recipe"]["image"]) == {
        *("resolution", "draft", "min_side", "max_aspect", "max_megapixels")
    }
    sample = Sample("k", {"json": json_bytes({"key": "k"}), "tokens.npy": _tokens()})
    write_shard([sample], out, 0, failures={})
    assert make_plan(request_, out) == plan
    limited = change_recipe(request_.recipe, ["image.max_upscale=1.5"])
    with pytest.raises(ConfigError, match=r"recipe\.image\.max_upscale: 1\.5, expected None"):
        make_plan(replace(request_, recipe=limited), out)
    other = str(tmp_path / "other")
    plan = make_plan(replace(request_, recipe=limited), other)
    assert plan.decided_by["recipe"]["image"]["max_upscale"] == 1.5
    # A limit beside the data, as another split may have, is not that of this plan.
    store_recipe(limited, str(tmp_path))
    assert JobFiles(out).recipe().image.max_upscale is None
    assert JobFiles(other).recipe().image.max_upscale == 1.5


def test_check_prepared_with_rejects_other_settings(tmp_path: Path) -> None:
    recipe = load_recipe("demo")
    store_recipe(recipe, str(tmp_path))
    check_prepared_with(recipe, str(tmp_path))
    check_prepared_with(recipe, str(tmp_path / "train"))
    other = recipe.model_copy(update={"text": TextConfig(strategy="space")})
    with pytest.raises(ConfigError, match=r"text\.strategy: space, expected hash"):
        check_prepared_with(other, str(tmp_path / "train"))
    (tmp_path / "vae").mkdir()
    moved = change_recipe(recipe, [f"encoders.vae={tmp_path / 'vae'}", "image.min_side=20"])
    check_prepared_with(moved, str(tmp_path))


def test_change_recipe_makes_paths_absolute_and_keeps_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "vae").mkdir()
    recipe = change_recipe(load_recipe("demo"), ["encoders.vae=vae"])
    assert recipe.encoders.vae == str(tmp_path / "vae")
    assert recipe.encoders.clip_text == "demo:clip_text"
    assert recipe.backbone.weights == "demo:backbone"


def _tokens() -> bytes:
    return npy_bytes(np.zeros(77, np.uint16))
