"""Stable Diffusion from a directory through every command: prepared, trained, selected, evaluated.

What a run leaves is loaded by diffusers alone, and gives the run's own image.
"""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file

from d2i.diffusion.draws import SampleDraws
from d2i.models.weights.load import read_described
from d2i.run_dir import last_step
from d2i.tokenize import clean
from tests.integration.fine_tuning import FULL, LORA, options, prepare, train_command
from tests.integration.pipelines import save_tiny_sd15, save_tiny_sdxl
from tests.processes import run_d2i, run_process

pytestmark = pytest.mark.timeout(600)

# The runs of the fixtures, by recipe, number of ranks and ZeRO stage.
UNDISTURBED = {(LORA, 2, 2): "lora_run", (FULL, 1, 0): "full_run"}
# The curly quote is one that CLIP's published cleaning replaces.
DIALOG = "Don\u2019t you love my dog?\nShow me!"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "base"
    save_tiny_sd15(directory)
    return directory


@pytest.fixture(scope="module")
def data(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(LORA, base, tmp_path_factory.mktemp("made"), 60)


@pytest.fixture(scope="module")
def lora_run(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "lora"
    run_d2i(*train_command(LORA, base, data, run, 2, 2))
    return run


@pytest.fixture(scope="module")
def full_run(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "full"
    run_d2i(*train_command(FULL, base, data, run))
    return run


def test_run_holds_what_was_trained_in_stock_layout(
    base: Path, lora_run: Path, full_run: Path
) -> None:
    adapter = lora_run / "adapter" / "pytorch_lora_weights.safetensors"
    described = read_described(adapter)
    metadata = json.loads(described["lora_adapter_metadata"])
    assert (metadata["unet.r"], metadata["unet.lora_alpha"]) == (4, 16)
    assert described["step"] == "6"
    config = json.loads((lora_run / "config.json").read_text())
    assert described["base_sha256"] == config["initial_weights"]["sha256"]
    assert all(name.startswith("unet.") for name in load_file(adapter))
    # The averages and what the optimizer updates are different weights.
    trained = lora_run / "adapter-trained" / "pytorch_lora_weights.safetensors"
    assert trained.read_bytes() != adapter.read_bytes()
    assert (full_run / "unet" / "config.json").read_bytes() == (
        base / "unet" / "config.json"
    ).read_bytes()
    network = load_file(full_run / "unet" / "diffusion_pytorch_model.safetensors")
    assert network.keys() == load_file(base / "unet" / "diffusion_pytorch_model.safetensors").keys()
    assert {last_step(str(run)) for run in (lora_run, full_run)} == {6}
    # The model card says where it comes from, and how to prompt it.
    card = (lora_run / "README.md").read_text()
    assert described["base_sha256"] in card
    assert "**Data**: made world." in card
    assert "# look what i saw # what? # a big red ball on the beach" in card
    for run in (lora_run, full_run):
        (program,) = re.findall(r"```python\n(.*?)```", (run / "README.md").read_text(), re.DOTALL)
        compile(program, "README.md", "exec")
    # A checkpoint holds the adapter alone.
    marker = json.loads((lora_run / "checkpoints" / "step-6" / "complete.json").read_text())
    assert all(".lora_" in name for name in marker["shapes"])
    assert marker["base_sha256"] == described["base_sha256"]


def draw(run: Path, out: Path) -> NDArray[np.uint8]:
    """Generate the image of the dialog, alone in its batch, by `d2i sample`."""
    dialog = out.with_suffix(".txt")
    dialog.write_text(DIALOG)
    run_d2i(
        *("sample", "--run", run, "--dialog", dialog, "--out", out, "--seed", 3),
        *("--set", "sample.compute_batch_size=1"),
    )
    with Image.open(out) as image:
        return np.asarray(image)


PAGE = Path(__file__).parents[2] / "docs" / "stable-diffusion.md"
OF_LORA = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)[0]
OF_NETWORK = """
from diffusers import StableDiffusionPipeline, UNet2DConditionModel

unet = UNet2DConditionModel.from_pretrained("runs/sd15/unet")
pipeline = StableDiffusionPipeline.from_pretrained("stable-diffusion-v1-5", unet=unet)
"""
FROM_SAME_NOISE = """
import sys
import numpy as np, torch

start, prompt, out = sys.argv[1:]
noise = torch.from_numpy(np.load(start))
np.save(out, pipeline(prompt, latents=noise, num_inference_steps=3, output_type="np").images[0])
"""


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_diffusers_alone_gives_image_of_run(
    base: Path, lora_run: Path, full_run: Path, tmp_path: Path, kind: str
) -> None:
    run = {"lora": lora_run, "full": full_run}[kind]
    pixels = draw(run, tmp_path / "picture.png")
    with Image.open(tmp_path / "picture.png") as image:
        key, seed = image.info["key"], int(image.info["seed"])
    np.save(tmp_path / "start.npy", SampleDraws([seed], [key]).normal("", (4, 8, 8)))
    program = (OF_LORA if kind == "lora" else OF_NETWORK) + FROM_SAME_NOISE
    program = program.replace("stable-diffusion-v1-5", str(base)).replace("runs/sd15", str(run))
    words = ["-W", "ignore", "-c", program, tmp_path / "start.npy", clean(key), tmp_path / "a.npy"]
    done = subprocess.run([sys.executable, *map(str, words)], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    # A PNG rounds to whole levels; beyond that the two agree to 1e-6.
    stock = np.clip(np.load(tmp_path / "a.npy"), 0, 1)
    assert np.abs(255 * stock - pixels).max() <= 0.5 + 255e-6


def test_run_is_selected_evaluated_and_reported(
    base: Path, data: Path, lora_run: Path, tmp_path: Path
) -> None:
    run = tmp_path / "lora"
    shutil.copytree(lora_run, run)
    best = run_d2i(
        *("select", "--run", run, "--metric", "clip_i", "--guidance", 2, "--guidance", 5),
        *("--num-instances", 3, "--json"),
    )
    assert best["guidance_scale"] in (2, 5)
    for name, system in (("base", ["sd15", "--weights", base]), ("tuned", [f"run:{run}"])):
        run_d2i(
            *("eval", "--system", *system, "--data", data, "--out", tmp_path / name),
            *options(base),
        )
    card = json.loads((tmp_path / "tuned" / "scores.json").read_text())["card"]
    assert card["trained_adapter"]["rank"] == 4
    assert card["sampler"] == "pipeline"
    run_d2i("report", tmp_path / "base", tmp_path / "tuned", "--out", tmp_path / "report.html")
    assert "LoRA of rank 4" in (tmp_path / "report.html").read_text()


@pytest.mark.soak
def test_other_linearization_trains_on_same_data(base: Path, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    changed: dict[str, Any] = {"train__num_steps": 2, "text__strategy": "space"}
    error = one_line_error(*train_command(LORA, base, data, run, **changed))
    assert "was prepared with other settings: got text.strategy: space, expected hash" in error
    run_d2i(*train_command(LORA, base, data, run, **changed, text__encode="on_the_fly"))
    run_d2i("eval", "--system", f"run:{run}", "--data", data, "--out", tmp_path / "scores")
    card = json.loads((tmp_path / "scores" / "scores.json").read_text())["card"]
    assert card["trained_text"]["strategy"] == card["text"]["strategy"] == "space"


@pytest.mark.soak
def test_sdxl_trains_on_text_of_its_two_encoders(tmp_path: Path) -> None:
    base, recipe, run = tmp_path / "base", "sdxl-lora-photochat", tmp_path / "run"
    save_tiny_sdxl(base)
    data = prepare(recipe, base, tmp_path, 30)
    changed = {"train__num_steps": 2, "train__num_sample_steps": 2}
    run_d2i(*train_command(recipe, base, data, run, **changed))
    assert (run / "samples" / "step-2.png").is_file()
    assert draw(run, tmp_path / "picture.png").shape == (64, 64, 3)
    run_d2i("eval", "--system", f"run:{run}", "--data", data, "--out", tmp_path / "scores")


@pytest.mark.soak
@pytest.mark.parametrize(
    ("recipe", "num_ranks", "stage"), itertools.product((LORA, FULL), (1, 2), range(4))
)
def test_killed_training_resumes_bit_exactly(
    base: Path,
    data: Path,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    recipe: str,
    num_ranks: int,
    stage: int,
) -> None:
    killed = tmp_path / "killed"
    words = train_command(recipe, base, data, killed, num_ranks, stage)
    if (recipe, num_ranks, stage) in UNDISTURBED:
        whole: Path = request.getfixturevalue(UNDISTURBED[recipe, num_ranks, stage])
    else:
        whole = tmp_path / "whole"
        run_d2i(*train_command(recipe, base, data, whole, num_ranks, stage))
    assert run_process(*words, "--fault", "train.step_done:kill:3").returncode != 0
    run_d2i(*words)
    part = "adapter" if recipe == LORA else "unet"
    for name in (part, f"{part}-ema-short", f"{part}-trained"):
        first, second = (
            next((run / name).glob("*.safetensors")).read_bytes() for run in (whole, killed)
        )
        assert first == second


def test_other_base_model_is_refused(
    base: Path, data: Path, lora_run: Path, tmp_path: Path
) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    shutil.copytree(lora_run, run)
    shutil.copytree(base, other)
    file = other / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    state["conv_in.bias"] += 1
    save_file(state, file, {"format": "pt"})
    error = one_line_error(*train_command(LORA, other, data, run, train__num_steps=8))
    assert "its network has sha256" in error
    assert "on which this run began" in error
    # The run names the directory that it began with; here that is another model.
    config = json.loads((run / "config.json").read_text())
    config["recipe"]["backbone"]["weights"] = str(other)
    (run / "config.json").write_text(json.dumps(config))
    (run / "config.json.sha256").unlink()
    dialog = tmp_path / "dialog.txt"
    dialog.write_text(DIALOG)
    words = ("sample", "--run", run, "--dialog", dialog, "--out", tmp_path / "a.png")
    assert "was trained on a base model whose network has sha256" in one_line_error(*words)
    # The command may say where the base model is now.
    run_d2i(*words, "--set", f"backbone.weights={base}")
    config["recipe"]["backbone"]["weights"] = "http://127.0.0.1:9/base"
    (run / "config.json").write_text(json.dumps(config))
    assert "no such directory" in one_line_error(*words)
    adapter = run / "adapter" / "pytorch_lora_weights.safetensors"
    adapter.write_bytes(adapter.read_bytes()[:-1] + b"x")
    error = one_line_error(*words, "--set", f"backbone.weights={base}")
    assert "does not match" in error or "sha256" in error


def one_line_error(*words: object) -> str:
    """Return the one error line of a command that its user can fix."""
    done = run_process(*words)
    assert done.returncode == 2, done.stderr[-2000:]
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    return errors[0]
