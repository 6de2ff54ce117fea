"""Flow transformers from a directory through every command, and back into the stock pipeline."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from d2i.backbones import presets_of
from d2i.config import TextConfig
from d2i.demo.corpus import write_corpus
from d2i.diffusion.draws import SampleDraws
from d2i.encoders.pipeline_text import PipelineText
from d2i.errors import CheckpointError
from d2i.models import family
from d2i.models.pipeline_dir import PipelineDirectory
from d2i.models.pipeline_family import PipelineFamily, pipeline_family
from d2i.recipes import load_recipe
from d2i.shards import ShardReader
from tests.integration.fine_tuning import SETTINGS
from tests.integration.pipelines import (
    save_tiny_flux2_klein,
    save_tiny_sana,
    save_tiny_sd15,
    save_tiny_z_image,
)
from tests.processes import run_d2i, run_process

pytestmark = pytest.mark.timeout(600)

SAVE: dict[str, Callable[[Path], None]] = {
    "z-image": save_tiny_z_image,
    "flux2-klein": save_tiny_flux2_klein,
    "sana": save_tiny_sana,
}
RECIPES = {
    "z-image": "z-image-lora-photochat",
    "flux2-klein": "flux2-klein-lora-photochat",
    "sana": "sana-photochat",
}
DIALOG = "Don\u2019t you love my dog?\nShow me!"


def options(base: Path, **changed: Any) -> list[str]:
    """Return the `--set` options of a tiny run, with settings such as `train__seed=1` changed."""
    values = SETTINGS | {
        "train.num_steps": 2,
        "train.num_validation_steps": 2,
        "train.num_sample_steps": 2,
        "encoders.compute_batch_size": 4,
    }
    # The size of latents follows from the resolution.
    del values["backbone.latent_size"]
    values |= {name.replace("__", "."): value for name, value in changed.items()}
    values |= {"backbone.weights": base}
    return [part for name, value in values.items() for part in ("--set", f"{name}={value}")]


def prepare_and_train(name: str, place: Path) -> tuple[Path, Path, Path]:
    """Make base, data and run of a family; return their directories."""
    base, data, run = (place / part for part in ("base", "data", "run"))
    recipe, corpus = RECIPES[name], place / "corpus"
    SAVE[name](base)
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    write_corpus(corpus, 16, 0)
    run_d2i(
        *("preprocess", "--corpus", "mmdialog", "--source", corpus, "--out", data),
        *("--recipe", recipe, "--workers", 0, *options(base)),
    )
    trained = run_process("train", "--recipe", recipe, "--data", data, "--run", run, *options(base))
    assert trained.returncode == 0, trained.stderr[-2000:]
    assert f"{name}: Its README.md names its licence, apache-2.0" in trained.stderr
    return base, data, run


@pytest.fixture(scope="module")
def z_image(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    return prepare_and_train("z-image", tmp_path_factory.mktemp("z-image"))


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name == "z-image" else pytest.mark.soak) for name in SAVE],
)
def test_family_goes_from_preprocess_to_report_and_into_stock_pipeline(
    name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if name == "z-image":
        base, data, run = request.getfixturevalue("z_image")
    else:
        base, data, run = prepare_and_train(name, tmp_path)
    arrays = ShardReader(str(data / "train")).manifest.arrays
    assert arrays.keys() == {family(name).codec.array, "clip"}
    assert (run / "samples" / "step-2.png").is_file()
    assert "license: apache-2.0" in (run / "README.md").read_text()
    is_lora = load_recipe(RECIPES[name]).adapter.kind is not None
    part = "adapter" if is_lora else presets_of(name).network_part
    if is_lora:
        # Every linear layer in a block, the modulation too.
        state = load_file(run / part / "pytorch_lora_weights.safetensors")
        assert all(key.startswith("transformer.") for key in state)
        adapted = {key.split(".lora_")[0].rpartition(".")[2] for key in state}
        assert adapted > {"to_q", "to_k", "to_v"}
    run_d2i("eval", "--system", f"run:{run}", "--data", data, "--out", tmp_path / "scores")
    run_d2i("report", tmp_path / "scores", "--out", tmp_path / "report.html")
    assert name in (tmp_path / "report.html").read_text()
    pixels, key, seed = draw(run, tmp_path / "a.png")
    stock = stock_pixels(name, base, run, part, key, seed)
    # A PNG rounds to whole levels; beyond that the two are the same.
    assert np.abs(255 * stock - pixels).max() <= 0.5 + 1e-5


def draw(run: Path, out: Path) -> tuple[Any, str, int]:
    """Generate the image of the dialog, alone in its batch, by `d2i sample`."""
    dialog = out.with_suffix(".txt")
    dialog.write_text(DIALOG)
    run_d2i(
        *("sample", "--run", run, "--dialog", dialog, "--out", out, "--seed", 3),
        *("--set", "sample.compute_batch_size=1"),
    )
    with Image.open(out) as image:
        return np.asarray(image), image.info["key"], int(image.info["seed"])


def stock_pixels(name: str, base: Path, run: Path, part: str, key: str, seed: int) -> Any:
    """Generate by diffusers alone, with what the run left."""
    import diffusers

    one, presets = pipeline_family(name), presets_of(name)
    kind: Any = getattr(diffusers, presets.pipeline or "")
    if part == "adapter":
        pipeline = kind.from_pretrained(base, dtype=torch.bfloat16)
        pipeline.load_lora_weights(run / part)
    else:
        network = one.network_class.from_pretrained(run / part, dtype=torch.bfloat16)
        pipeline = kind.from_pretrained(base, dtype=torch.bfloat16, **{part: network})
    side = 64 // one.codec.factor
    noise = SampleDraws([seed], [key]).normal("", one.codec.latent_shape(side))
    return pipeline(
        prompt=one.clean(key),
        latents=one.patches(torch.from_numpy(noise)),
        num_inference_steps=3,
        guidance_scale=load_recipe(RECIPES[name]).sample.guidance_scale,
        height=64,
        width=64,
        output_type="np",
        **presets.call_options,
    ).images[0]


def test_training_text_is_that_of_pipeline_and_does_not_depend_on_batch(tmp_path: Path) -> None:
    lines = ["# hello", "# " + "a long dialog " * 60 + "# the end", "# <|im_end|> or <eos>", ""]
    for name, save in SAVE.items():
        base = tmp_path / name
        save(base)
        text = PipelineText(str(base), pipeline_family(name), TextConfig(), 2, "cpu")
        found, empty = text.encode(lines), text.encode_empty()
        assert found["text"].dtype == np.float32
        alone = text.encode(lines[2:3])
        length = alone["text"].shape[1]
        np.testing.assert_array_equal(alone["text"][0], found["text"][2, :length])
        # What is dropped is what sampling guides away from.
        if name != "sana":
            length = len(empty["text"])
            np.testing.assert_array_equal(found["text"][3, :length], empty["text"])
        if "mask" in found:
            assert not found["text"][~found["mask"]].any() or name == "sana"


@pytest.mark.parametrize("memory", [pytest.param("offload", marks=pytest.mark.soak), "free"])
def test_memory_of_text_encoder_changes_no_weight(
    memory: str, z_image: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    base, data, kept = z_image
    words = options(base, train__text_encoder_memory=memory, train__num_sample_steps="null")
    run = tmp_path / "run"
    run_d2i("train", "--recipe", RECIPES["z-image"], "--data", data, "--run", run, *words)
    adapter = Path("adapter-trained", "pytorch_lora_weights.safetensors")
    assert (run / adapter).read_bytes() == (kept / adapter).read_bytes()


def rename_to_turbo(base: Path) -> Path:
    save_tiny_z_image(base / "Z-Image-Turbo")
    return base / "Z-Image-Turbo"


def save_distilled(base: Path) -> Path:
    save_tiny_flux2_klein(base / "klein", is_distilled=True)
    return base / "klein"


def save_sprint(base: Path) -> Path:
    save_tiny_sana(base / "sana")
    index = base / "sana" / "model_index.json"
    words = json.loads(index.read_text()) | {"_class_name": "SanaSprintPipeline"}
    index.write_text(json.dumps(words))
    return base / "sana"


def test_network_that_was_trained_back_from_turbo_is_no_distilled_one(tmp_path: Path) -> None:
    save_tiny_z_image(tmp_path / "Z-Image-De-Turbo")
    PipelineDirectory(str(tmp_path / "Z-Image-De-Turbo"), presets_of("z-image"))


@pytest.mark.parametrize(
    ("name", "make", "expected"),
    [
        ("z-image", rename_to_turbo, "base model, such as Tongyi-MAI/Z-Image; "),
        ("flux2-klein", save_distilled, "such as black-forest-labs/FLUX.2-klein-base-4B; "),
        ("sana", save_sprint, "such as Efficient-Large-Model/Sana_1600M_1024px_diffusers; "),
    ],
)
def test_distilled_variant_is_refused_with_its_base(
    name: str, make: Callable[[Path], Path], expected: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError) as caught:
        PipelineDirectory(str(make(tmp_path)), presets_of(name))
    assert expected in str(caught.value)
    assert "distilled" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_network_that_predicts_something_else_is_refused(tmp_path: Path) -> None:
    save_tiny_z_image(tmp_path / "base")
    file = tmp_path / "base" / "scheduler" / "scheduler_config.json"
    config = json.loads(file.read_text()) | {"_class_name": "DDIMScheduler"}
    file.write_text(json.dumps(config))
    index = tmp_path / "base" / "model_index.json"
    words = json.loads(index.read_text()) | {"scheduler": ["diffusers", "DDIMScheduler"]}
    index.write_text(json.dumps(words))
    with pytest.raises(CheckpointError, match="expected flow_prediction"):
        PipelineDirectory(str(tmp_path / "base"), presets_of("z-image"))
    save_tiny_sd15(tmp_path / "sd15")
    with pytest.raises(CheckpointError, match="expected a ZImagePipeline"):
        PipelineDirectory(str(tmp_path / "sd15"), presets_of("z-image"))


def test_scheduler_of_another_solver_gives_levels_of_its_file(tmp_path: Path) -> None:
    """Sana's file is of a DPM solver, which the published script reads as an Euler scheduler."""
    import diffusers

    save_tiny_sana(tmp_path / "base")
    solver = diffusers.DPMSolverMultistepScheduler(
        flow_shift=3.0, use_flow_sigmas=True, prediction_type="flow_prediction"
    )
    solver.save_pretrained(tmp_path / "base" / "scheduler")
    index = tmp_path / "base" / "model_index.json"
    words = json.loads(index.read_text())
    words["scheduler"] = ["diffusers", "DPMSolverMultistepScheduler"]
    index.write_text(json.dumps(words))
    one: Any = family("sana")
    assert isinstance(one, PipelineFamily)
    network = one.build_described(str(tmp_path / "base"), load_recipe("sana-photochat").backbone)
    latent = torch.zeros(1, 32, 2, 2)
    script, report = (one.flow_schedule(network, kind, latent) for kind in ("script", "report"))
    assert float(script.sigmas[500]) == pytest.approx(0.5)
    assert float(report.sigmas[500]) == pytest.approx(3 * 0.5 / (1 + 2 * 0.5))
