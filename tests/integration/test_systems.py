"""Every kind of system, from dialogs to scores, and the errors of invalid systems."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from d2i.cluster import Session
from d2i.config import Recipe
from d2i.errors import ConfigError, D2IError, DataError
from d2i.eval.job import evaluate
from d2i.eval.minigpt5_export import export_dialogs
from d2i.eval.prompts import ContextMode
from d2i.eval.request import EvalRequest
from d2i.eval.systems import parse_system
from d2i.eval.systems.divter import (
    DivterCaptioner,
    DivterCaptionerConfig,
    read_pairs,
    train_divter_captioner,
)
from d2i.eval.worker import SaveImages
from d2i.metric_specs import METRICS
from d2i.recipes import change_recipe, read_stored_recipe
from d2i.report.evaluation import read_evaluation
from d2i.report.paper_tables import table2
from d2i.run_dir import EMA_NAME
from d2i.shards import ShardReader, data_set_url
from d2i.weights_resolve import resolve_weights
from tests.integration.networks import save_random_describer
from tests.integration.pipelines import save_tiny_pipeline, save_tiny_unclip

FEW_STEPS = ("sample.num_steps=2", "sample.compute_batch_size=8")


def recipe_of(data: Path | str, *settings: str) -> Recipe:
    return change_recipe(read_stored_recipe(str(data)), [*FEW_STEPS, *settings])


def scored(
    data: Path | str,
    out: Path,
    system: str,
    *settings: str,
    weights: str | None = None,
    label: str | None = None,
    context: ContextMode = "full",
    save_images: SaveImages = "sample",
    **options: Any,
) -> dict[str, Any]:
    """Evaluate in this process."""
    recipe = recipe_of(data, *settings)
    spec = parse_system(system, weights, recipe)
    spec = replace(spec, label=label or spec.label)
    url = data_set_url(str(data), "test")
    request = EvalRequest(recipe, spec, url, str(out), context, save_images)
    return evaluate(request, Session(0), lambda _: None, **options)


def assert_scored(result: dict[str, Any], num: int = 23) -> None:
    assert result["card"]["found"] == num
    named = set(METRICS)
    assert np.isfinite([result["scores"][name] for name in named]).all()
    assert set(result["intervals"]) == named - {"kid"}
    for name, (low, high) in result["intervals"].items():
        assert low <= result["scores"][name] <= high


def assert_row(out: Path, name: str) -> None:
    """Assert that the evaluation is a row of Table 2 with all of its scores."""
    (table,) = table2([read_evaluation(out)])
    (row,) = table.rows
    assert row.heading == name
    blank = {c for c, cell in zip(table.columns, row.cells, strict=True) if cell.value is None}
    assert blank == {"FID (paper)", "IS (paper)", "CLIP-I (paper)"}


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "instances.jsonl").read_text().splitlines()]


def test_diffusers_pipeline_is_evaluated_from_directory(tmp_path: Path, chat_data: Path) -> None:
    save_tiny_pipeline(tmp_path / "pipeline")
    arguments = 'sample.pipeline={"num_inference_steps": 2, "height": 64, "width": 64}'
    system = f"diffusers:{tmp_path / 'pipeline'}"
    result = scored(chat_data, tmp_path / "out", system, arguments)
    assert_scored(result)
    assert result["card"]["weights"]["pipeline"] == "StableDiffusionPipeline"
    assert result["card"]["pipeline_arguments"]["num_inference_steps"] == 2
    assert_row(tmp_path / "out", "pipeline")
    grouped = scored(chat_data, tmp_path / "grouped", system, arguments, task_size=3)
    assert grouped == result


def test_unclip_pipeline_is_evaluated(tmp_path: Path, chat_data: Path) -> None:
    save_tiny_unclip(tmp_path / "unclip")
    steps = {f"{part}_num_inference_steps": 2 for part in ("prior", "decoder", "super_res")}
    arguments = f"sample.pipeline={json.dumps(steps)}"
    result = scored(chat_data, tmp_path / "out", f"unclip:{tmp_path / 'unclip'}", arguments)
    assert_scored(result)
    assert_row(tmp_path / "out", "unCLIP (Karlo)")
    window = {"tokens": 77, "dialog_tokens": 75}
    assert result["card"]["text_tokens"] == {"text_encoder": window}


def test_retrieval_system_returns_training_images(tmp_path: Path, chat_data: Path) -> None:
    """Remote data are read through the cache directory that the caller names."""
    elsewhere, cache = f"simplecache::file://{chat_data}", tmp_path / "cache"
    through = partial(ShardReader, cache_dir=cache, cache_gb=0.001)
    system = f"retrieve:{elsewhere}"
    result = scored(elsewhere, tmp_path / "out", system, save_images="all", open_shards=through)
    assert_scored(result)
    assert_row(tmp_path / "out", "nearest training picture")
    num_shards = sum(len(list((chat_data / split).glob("*.tar"))) for split in ("train", "test"))
    assert len(list(cache.glob("*.d2i-tar"))) == num_shards
    assert (
        result["card"]["weights"]["pictures"]
        == ShardReader(str(chat_data / "train")).manifest.sha256
    )


def test_divter_learns_to_describe_and_is_evaluated(tmp_path: Path, chat_data: Path) -> None:
    pairs = read_pairs(str(chat_data / "train"), recipe_of(chat_data).text)
    assert len(pairs) == 12
    assert all(text.startswith("# ") and said.endswith(" ball") for text, said in pairs)
    save_random_describer(tmp_path / "base")
    losses: list[float] = []
    out = tmp_path / "describer"
    config = DivterCaptionerConfig(num_steps=60, batch_size=12, lr=3e-3)
    train_divter_captioner(
        pairs, str(tmp_path / "base"), out, config, lambda _, loss: losses.append(loss)
    )
    assert losses[-1] < 0.5 * losses[0]
    described = DivterCaptioner(str(out)).describe(pairs[0][0])
    assert described == DivterCaptioner(str(out)).describe(pairs[0][0])
    assert "b" in described

    system = f"divter:{out},uvit-s"
    result = scored(chat_data, tmp_path / "scores", system, weights="demo:backbone")
    assert_scored(result)
    assert_row(tmp_path / "scores", "Divter")
    assert {"describer", "backbone"} <= set(result["card"]["weights"])


def test_external_images_are_matched_by_instance_key(tmp_path: Path, chat_data: Path) -> None:
    """As for MiniGPT-5: export dialogs, read images named by key, label the table row."""
    assert export_dialogs(str(chat_data / "test"), str(tmp_path / "export")) == 23
    lines = (tmp_path / "export/test/conversations.json").read_text().splitlines()
    keys = list(ShardReader(str(chat_data / "test")).keys)
    made = tmp_path / "made"
    made.mkdir()
    for line, key in zip(lines, keys, strict=True):
        turns = [turn["turn"] for turn in json.loads(line)["conversation"]]
        assert len(turns) >= 2
        assert all(part["__TEXT__"] for turn in turns for part in turn if "__TEXT__" in part)
        assert turns[-1][-1] == {"__MEDIA__": key}
        with Image.open(tmp_path / "export/test" / f"{key}.jpg") as true:
            true.convert("RGB").save(made / f"{key}.png")
    (made / f"{keys[3]}.png").unlink()
    (made / f"{keys[5]}.png").write_bytes(b"no picture")
    Image.new("RGB", (64, 64), "red").save(made / f"{keys[7]}.png")
    result = scored(chat_data, tmp_path / "out", f"images:{made}", label="MiniGPT-5")
    assert_scored(result, num=21)
    assert_row(tmp_path / "out", "MiniGPT-5")
    card = result["card"]
    assert (card["label"], card["expected"], card["codec"]) == ("MiniGPT-5", 23, "png files")
    assert card["failures"] == {"missing_picture": 1, "not_an_image": 1}
    assert {row["key"]: row["status"] for row in rows(tmp_path / "out") if "clip_i" not in row} == {
        keys[3]: "missing_picture",
        keys[5]: "not_an_image",
    }
    true = [
        row for row in rows(tmp_path / "out") if row["status"] == "ok" and row["key"] != keys[7]
    ]
    assert [row["clip_i"] for row in true] == pytest.approx([100.0] * 20)
    assert {row["rank"] for row in true} == {1}
    warnings = "\n".join(result["warnings"])
    assert f"images of a single colour: 1, the first is that of {keys[7]}" in warnings
    assert "FID on 21 images is noisy and biased" in warnings
    assert "21 of 23 instances have an image" in warnings
    assert "2 sizes (64x64, 80x64)" in warnings


def test_image_file_order_and_extension_change_no_score(tmp_path: Path, chat_data: Path) -> None:
    """Scores depend on neither file order nor extension; CLIP-I is the mean of the rows."""
    write_noise_images(tmp_path / "a", chat_data)
    (tmp_path / "b").mkdir()
    for path in (tmp_path / "a").iterdir():
        (tmp_path / "b" / f"{path.stem}.PNG").write_bytes(path.read_bytes())
    first = scored(chat_data, tmp_path / "first", f"images:{tmp_path / 'a'}")
    second = scored(chat_data, tmp_path / "second", f"images:{tmp_path / 'b'}")
    assert first["scores"] == second["scores"]
    assert first["scores"]["clip_i"] == pytest.approx(
        np.mean([row["clip_i"] for row in rows(tmp_path / "first")])
    )


def test_image_directory_without_keys_raises_and_mixed_codecs_warn(
    tmp_path: Path, chat_data: Path
) -> None:
    (tmp_path / "other").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "other/00001.png")
    with pytest.raises(DataError, match=r"no image is named by an instance key: got 1 files, .*"):
        scored(chat_data, tmp_path / "out", f"images:{tmp_path / 'other'}")
    for number, key in enumerate(ShardReader(str(chat_data / "test")).keys):
        name = f"{key}.{'jpg' if number % 2 else 'png'}"
        Image.effect_noise((64, 64), 50).convert("RGB").save(tmp_path / "other" / name)
    result = scored(chat_data, tmp_path / "out", f"images:{tmp_path / 'other'}")
    assert any("different codecs (jpg, png)" in warning for warning in result["warnings"])
    assert result["card"]["codec"] == "jpg, png files"


def test_context_ablation_changes_scores(tmp_path: Path, chat_data: Path) -> None:
    """With the same noise the four context modes give four different FIDs."""
    found = {
        mode: scored(chat_data, tmp_path / mode, "uvit-s", weights="demo:backbone", context=mode)
        for mode in ("full", "last", "none", "shuffled")
    }
    assert len({result["scores"]["fid"] for result in found.values()}) == 4
    assert {mode: result["card"]["context"] for mode, result in found.items()} == {
        mode: mode for mode in found
    }
    letters = scored(
        chat_data, tmp_path / "letters", "uvit-s", "text.strategy=letters", weights="demo:backbone"
    )
    assert letters["card"]["text"]["strategy"] == "letters"
    assert letters["scores"]["fid"] != found["full"]["scores"]["fid"]
    with pytest.raises(ConfigError, match="context: full, expected last"):
        scored(chat_data, tmp_path / "last", "uvit-s", weights="demo:backbone")


def test_reference_features_are_cached_and_verified(
    tmp_path: Path, chat_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    first = scored(chat_data, tmp_path / "first", f"retrieve:{chat_data}")
    (kept,) = (tmp_path / "cache/d2i").glob("*/real_features.npy")
    assert scored(chat_data, tmp_path / "second", f"retrieve:{chat_data}") == first
    # Changed numbers or a truncated file fail the checksum and are computed again.
    good = kept.read_bytes()
    np.save(kept, np.load(kept) + 1)
    assert scored(chat_data, tmp_path / "third", f"retrieve:{chat_data}") == first
    assert kept.read_bytes() == good
    kept.write_bytes(good[:100])
    assert scored(chat_data, tmp_path / "fourth", f"retrieve:{chat_data}") == first
    # The cache is really read: changed features with a valid checksum change the scores.
    np.save(kept, np.load(kept) + 1)
    described = kept.with_name("described.json")
    said = json.loads(described.read_text())
    said["sha256"]["real_features"] = hashlib.sha256(kept.read_bytes()).hexdigest()
    described.write_text(json.dumps(said))
    marked = scored(chat_data, tmp_path / "fifth", f"retrieve:{chat_data}")
    assert marked["scores"]["fid"] != first["scores"]["fid"]
    other = scored(chat_data, tmp_path / "other", f"retrieve:{chat_data}", "metrics.resolution=32")
    assert other["card"]["resolution"] == 32
    assert len(list((tmp_path / "cache/d2i").glob("*/real_features.npy"))) == 2


def test_nan_images_are_failures(tmp_path: Path, chat_data: Path) -> None:
    """A network that outputs NaN gives failures, not black images."""
    backbone = Path(resolve_weights("demo:backbone"))
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in (path for path in backbone.iterdir() if path.suffix != ".sha256"):
        (broken / path.name).write_bytes(path.read_bytes())
    (file,) = broken.glob("*.safetensors")
    state = load_file(file)
    name = max(state, key=lambda key: state[key].numel())
    # NaN weights are rejected on loading; these are finite, but their outputs are not.
    save_file(state | {name: torch.full(state[name].shape, 1e38)}, file)
    with pytest.raises(
        DataError, match=r"got 0 generated images for 23 instances \(23 not_finite\)"
    ):
        scored(chat_data, tmp_path / "out", "uvit-s", weights=str(broken))
    assert {row["status"] for row in rows(tmp_path / "out")} == {"not_finite"}


@pytest.mark.parametrize(
    ("system", "message"),
    [
        ("stable", "unknown system; expected run:DIR, diffusers:PATH"),
        ("json:dumps.nothing", "unknown system"),
        ("divter:somewhere", "expected divter:DIR,SYSTEM"),
        ("uvit-s", "got no weights; expected mscoco_uvit_small.pth"),
        ("run:nowhere", "nowhere is not a run"),
        ("diffusers:nowhere/at/all", "cannot load DiffusionPipeline"),
        ("images:nowhere", "got an empty directory"),
        ("divter:nowhere,images:nowhere", "cannot load AutoModelForCausalLM"),
    ],
)
def test_invalid_system_is_one_line_error(
    tmp_path: Path, chat_data: Path, system: str, message: str
) -> None:
    with pytest.raises(D2IError, match=message) as caught:
        scored(chat_data, tmp_path / "out", system)
    assert "\n" not in str(caught.value)


def test_changed_weights_of_run_are_rejected(tmp_path: Path, chat_data: Path) -> None:
    recipe = recipe_of(chat_data)
    run = tmp_path / "run"
    run.mkdir()
    backbone = Path(resolve_weights("demo:backbone"))
    sizes = json.loads((backbone / "config.json").read_text())
    values = recipe.model_dump(mode="json") | {"backbone": sizes}
    (run / "config.json").write_text(json.dumps({"recipe": values}))
    (run / EMA_NAME).write_bytes((backbone / "model.safetensors").read_bytes())
    result = scored(chat_data, tmp_path / "out", f"run:{run}")
    assert result["card"]["backbone"] == "uvit-s"
    save_file({key: 2 * value for key, value in load_file(run / EMA_NAME).items()}, run / EMA_NAME)
    # All images exist already, but the changed weights would not give these scores.
    with pytest.raises(ConfigError, match=r"from before its files changed; .* another --out"):
        scored(chat_data, tmp_path / "out", f"run:{run}")


def test_changed_image_directory_is_rejected(tmp_path: Path, chat_data: Path) -> None:
    made, system = tmp_path / "made", f"images:{tmp_path / 'made'}"
    write_noise_images(made, chat_data)
    first = scored(chat_data, tmp_path / "out", system)
    (made / "log.txt").write_text("no picture: it changes nothing")
    assert scored(chat_data, tmp_path / "out", system) == first
    (made / "0.png").write_bytes(b"a picture of no key")
    with pytest.raises(ConfigError, match="before its files changed"):
        scored(chat_data, tmp_path / "out", system)


def test_image_directory_with_small_or_duplicate_images(tmp_path: Path, chat_data: Path) -> None:
    made, system = tmp_path / "made", f"images:{tmp_path / 'made'}"
    key = write_noise_images(made, chat_data, side_px=32)
    with pytest.raises(ConfigError, match=r"--context none: .*images:.* expected full"):
        scored(chat_data, tmp_path / "out", system, context="none")
    warnings = scored(chat_data, tmp_path / "out", system)["warnings"]
    assert any("images of 32x32 were upscaled to 64x64" in warning for warning in warnings)
    (made / f"{key}.jpg").write_bytes((made / f"{key}.png").read_bytes())
    with pytest.raises(DataError, match=rf"two images for one key, {key}.jpg and {key}.png"):
        scored(chat_data, tmp_path / "other", system)


def write_noise_images(directory: Path, data: Path, side_px: int = 64) -> str:
    """Write a noise image for each test key; return one of the keys."""
    directory.mkdir()
    keys = ShardReader(str(data / "test")).keys
    for number, key in enumerate(keys):
        noise = Image.effect_noise((side_px, side_px), 10 + 10 * number)
        noise.convert("RGB").save(directory / f"{key}.png")
    return keys[0]
