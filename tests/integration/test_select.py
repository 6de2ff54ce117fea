"""A run on real photographs: its sample grids, and the checkpoint that `d2i select` chooses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from d2i.errors import ConfigError
from d2i.eval.generation_settings import choose_settings
from d2i.eval.systems import parse_system
from d2i.models.weights.load import read_state_dict
from d2i.recipes import change_recipe
from d2i.run_dir import read_recipe
from tests.integration.commands import preprocess
from tests.processes import run_d2i, run_process
from tests.shared import SHARED, needs_shared

pytestmark = needs_shared
SOURCE = SHARED / "data" / "mmdialog"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, settings: list[str]) -> Path:
    directory = tmp_path_factory.mktemp("select")
    data, run = directory / "data", directory / "run"
    preprocess("mmdialog", SOURCE, data, *settings)
    drawn = ("--set", "train.num_steps=4", "--set", "train.num_sample_steps=4")
    run_d2i("train", "--recipe", "demo", "--data", data, "--run", run, *settings, *drawn)
    return run


def test_sample_grid_shows_reference_and_generated_images(run: Path) -> None:
    grid = Image.open(run / "samples" / "step-4.png")
    pixels = np.asarray(grid.convert("RGB"))
    side = pixels.shape[0] // 2
    assert pixels.shape[1] % side == 0
    assert grid.info["step"] == "4"
    assert grid.info["weights_kind"] == "ema"
    # The reference images are photographs; such a short training generates other images.
    assert (pixels[:side] != pixels[side:]).mean() > 0.5
    assert pixels[:side].std() > 10


def test_tensorboard_matches_metrics_jsonl(run: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard")).Reload()
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    found = events.Scalars("train/loss")[-1]
    assert found.step == last["step"]
    assert found.value == pytest.approx(last["loss"], rel=1e-5)
    assert events.Scalars("valid/loss")


def test_select_writes_best_candidate_and_eval_uses_it(run: Path) -> None:
    words = ("select", "--run", run, "--num-instances", 4, "--metric", "clip_i", "--json")
    best = run_d2i(*words, "--guidance", 1, "--guidance", 3)
    assert best == json.loads((run / "best.json").read_text())
    tried = [(c["step"], c["weights_kind"], c["guidance_scale"]) for c in best["candidates"]]
    kinds = ("ema", "ema-short", "trained")
    assert tried == [(s, kind, g) for s in (2, 4) for kind in kinds for g in (1, 3)]
    assert best["value"] == max(c["scores"]["clip_i"] for c in best["candidates"])
    # Only two images of the validation split are readable: the subset is all of them.
    assert best["num_instances"] == 2
    assert (best["weights_kind"], best["last_step"]) == ("ema", 4)
    weights = read_state_dict(run / best["weights"])
    assert weights.keys() == read_state_dict(run / "ema.safetensors").keys()
    tasks = {path: path.stat().st_mtime_ns for path in run.glob("select/*/*/tasks/*.npz")}
    assert tasks
    assert run_d2i(*words, "--guidance", 1, "--guidance", 3) == best
    assert {path: path.stat().st_mtime_ns for path in tasks} == tasks

    words = ("eval", "--system", f"run:{run}", "--data", run.parent / "data", "--json")
    chosen = run_d2i(*words, "--out", run.parent / "chosen")["card"]
    assert chosen["guidance_scale"] == best["guidance_scale"]
    assert chosen["weights_kind"] == best["weights_kind"]
    assert chosen["guidance_chosen_by"]["how"] == "select"
    recipe = change_recipe(read_recipe(str(run)), choose_settings(f"run:{run}", []).settings)
    assert parse_system(f"run:{run}", None, recipe).backbone.weights == str(run / best["weights"])
    other = ("--set", "sample.guidance_scale=5", "--out", run.parent / "other")
    assert run_d2i(*words, *other)["card"]["guidance_scale"] == 5


def test_select_chooses_guidance_of_published_backbone(run: Path, tmp_path: Path) -> None:
    """The evaluation uses it and the card records it; the choice for another system is rejected."""
    data, out = run.parent / "data", tmp_path / "chosen"
    backbone = ("--system", "uvit-s", "--weights", run / "ema.safetensors", "--data", data)
    words = (*backbone, "--set", "sample.num_steps=2", "--json")
    scales = ("--guidance", 1, "--guidance", 4, "--metric", "clip_i")
    best = run_d2i("select", *words, "--out", out, *scales)
    assert [c["guidance_scale"] for c in best["candidates"]] == [1, 4]
    assert best == json.loads((out / "best.json").read_text())

    card = run_d2i("eval", *words, "--selected", out, "--out", tmp_path / "scores")["card"]
    assert card["guidance_scale"] == best["guidance_scale"]
    assert card["guidance_chosen_by"] == {
        "how": "select",
        **{name: best[name] for name in ("metric", "value", "num_instances", "seed")},
    }
    with pytest.raises(
        ConfigError, match=r"selected with --weights .*ema\.safetensors, got .*other"
    ):
        choose_settings("uvit-s", [], str(out), weights=str(tmp_path / "other.safetensors"))
    with pytest.raises(ConfigError, match="were selected for uvit-s, got uvit-s-deep"):
        choose_settings("uvit-s-deep", [], str(out), weights=str(run / "ema.safetensors"))


def test_select_of_system_without_guidance_is_error(run: Path, tmp_path: Path) -> None:
    words = ("select", "--system", f"images:{tmp_path}", "--data", run.parent / "data")
    refused = run_process(*words, "--out", tmp_path / "chosen")
    assert refused.returncode == 2
    assert "has no guidance scale to select" in refused.stderr


def test_sample_weights_setting_generates_with_trained_weights(run: Path, tmp_path: Path) -> None:
    (run / "best.json").unlink(missing_ok=True)
    words = ("eval", "--system", f"run:{run}", "--data", run.parent / "data", "--json")
    trained = ("--set", "sample.weights=trained", "--out", tmp_path / "trained")
    card = run_d2i(*words, *trained)["card"]
    assert card["weights_kind"] == "trained"
    assert list(card["files"]) == [str(run / "trained.safetensors")]
    usual = run_d2i(*words, "--out", tmp_path / "usual")["card"]
    assert usual["weights_kind"] == "ema"
    assert usual["weights"]["backbone"] != card["weights"]["backbone"]

    # An evaluation begun before the setting existed resumes, and reads the same weights.
    kept = tmp_path / "usual" / "evaluation.json"
    decided = json.loads(kept.read_text())
    del decided["recipe"]["sample"]["weights"]
    kept.write_text(json.dumps(decided))
    (tmp_path / "usual" / "evaluation.json.sha256").unlink()
    assert run_d2i(*words, "--out", tmp_path / "usual")["card"] == usual

    image = tmp_path / "picture.png"
    (tmp_path / "chat.txt").write_text("look at this")
    chat = ("--dialog", tmp_path / "chat.txt", "--out", image, *trained[:2])
    run_d2i("sample", "--run", run, *chat, "--json")
    with Image.open(image) as drawn:
        assert drawn.info["weights_kind"] == "trained"
        assert drawn.info["weights"] == card["weights"]["backbone"]
