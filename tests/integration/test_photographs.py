"""The recipe `small` on twelve photographs: prepared, inspected, trained on, and answered."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

import d2i
from d2i.cli.inspect import inspect
from d2i.cluster import Session
from d2i.preprocess.job import PreprocessRequest, make_splits
from d2i.recipes import resolve_recipe
from d2i.run_dir import read_metrics, read_recipe
from tests.integration.networks import save_random_clip
from tests.integration.pipelines import save_tiny_autoencoder
from tests.processes import run_d2i
from tests.shared import SHARED

PHOTOS = Path(__file__).resolve().parents[1] / "photos"
TAESD = SHARED / "weights" / "taesd_fp8.safetensors"


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Settings of the recipe: TAESD, or a random one without the reference data; random CLIPs."""
    directory = tmp_path_factory.mktemp("encoders")
    save_random_clip(directory)
    vae = TAESD if TAESD.exists() else save_tiny_autoencoder(directory / "vae", "tiny-kl-f8c4")
    values = {
        "encoders.vae": vae,
        "encoders.clip_image": directory / "clip_image",
        "encoders.clip_text": directory / "clip_text",
        "encoders.compute_batch_size": 4,
        "metrics.clip_text": directory / "clip_text",
        "backbone.text_dim": 32,
        "backbone.dim": 32,
        "backbone.depth": 3,
        "backbone.num_heads": 2,
        "train.num_steps": 3,
        "train.global_batch_size": 4,
        "sample.num_steps": 2,
        "sample.compute_batch_size": 1,
    }
    return [f"{name}={value}" for name, value in values.items()]


def prepare(out: Path, recipe: str, settings: list[str]) -> Path:
    """Prepare the photographs in three splits, in this process."""
    chosen = resolve_recipe(recipe, settings)
    divided = chosen.corpus.divided("0.7,0.15,0.15", 0)
    chosen = chosen.model_copy(update={"corpus": divided})
    request = PreprocessRequest("jsonl", str(PHOTOS / "chats.jsonl"), str(out), chosen)
    summaries = make_splits(request, Session(0), lambda _: None)
    assert (
        sum(summary.num_written for summary in summaries) == len(list(PHOTOS.glob("*.jpg"))) == 12
    )
    return out


@pytest.mark.slow
def test_small_recipe_from_photographs_to_an_answer(
    tmp_path: Path,
    settings: list[str],
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        data = prepare(tmp_path / "data", "small", settings)
    warned = [line for line in caplog.messages if "reconstructs these images poorly" in line]
    # The real codec keeps photographs; a random one does not.
    assert len(warned) == (0 if TAESD.exists() else 1)

    inspect(str(data / "test"), as_json=True)
    found = json.loads(capsys.readouterr().out)["reconstruction"]
    assert found["num_images"] == 2
    assert (found["psnr_db"] >= 20) == TAESD.exists() == (found["warning"] is None)
    inspect(str(data / "train"))
    assert "image codec not measured: these shards keep no source" in capsys.readouterr().out

    run, words = tmp_path / "run", [part for setting in settings for part in ("--set", setting)]
    run_d2i("train", "--recipe", "small", "--data", data, "--run", run, *words)
    assert read_recipe(str(run)).backbone.is_random
    assert read_metrics(str(run))[-1].step == 3

    answer = d2i.load(str(run)).generate(["what did you buy?", "a red hat"])
    assert answer.size == (128, 128)


def test_poor_codec_is_told_while_preparing_and_by_inspect(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.WARNING):
        data = prepare(tmp_path / "data", "demo", [])
    (warning,) = (line for line in caplog.messages if "poorly" in line)
    assert "encoders.vae demo:vae" in warning and "--recipe small" in warning

    page = tmp_path / "page.html"
    inspect(str(data / "test"), html=str(page), num=1)
    out = capsys.readouterr().out
    assert "warning: encoders.vae demo:vae reconstructs these images poorly" in out
    html = page.read_text()
    assert "Images, and their reconstructions below" in html and "reconstructs these" in html
    # The grid, the source image and the decoded latents.
    assert html.count("base64,") == 3

    stored = json.loads((data / "recipe.json").read_text())
    stored["encoders"]["vae"] = "nobody/nothing"
    (data / "recipe.json").write_text(json.dumps(stored))
    (data / "recipe.json.sha256").unlink()
    inspect(str(data / "test"))
    assert "image codec not measured: encoders.vae nobody/nothing" in capsys.readouterr().out
