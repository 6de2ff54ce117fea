"""A directory that is not the pipeline of the backbone is refused in one line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from d2i.backbones import presets_of
from d2i.config import BackboneConfig
from d2i.encoders.pretrained import weights_hash
from d2i.errors import CheckpointError
from d2i.models.model_dir import build_network
from d2i.models.pipeline_dir import PipelineDirectory
from tests.integration.pipelines import save_tiny_sd15


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "base"
    save_tiny_sd15(directory)
    return directory


def change_json(file: Path, **values: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def without_vae(base: Path) -> None:
    shutil.rmtree(base / "vae")


def without_index(base: Path) -> None:
    (base / "model_index.json").unlink()


def without_weights(base: Path) -> None:
    (base / "unet" / "diffusion_pytorch_model.safetensors").unlink()


def predicting_velocity(base: Path) -> None:
    change_json(base / "scheduler" / "scheduler_config.json", prediction_type="v_prediction")


def quantised(base: Path) -> None:
    change_json(base / "unet" / "config.json", quantization_config={"quant_method": "bitsandbytes"})


def of_another_class(base: Path) -> None:
    change_json(base / "model_index.json", _class_name="StableDiffusionXLPipeline")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (without_vae, "its vae is missing"),
        (without_index, "model_index.json does not exist"),
        (without_weights, "cannot read its weights"),
        (predicting_velocity, "prediction_type v_prediction; expected epsilon"),
        (quantised, "its unet is quantised"),
        (of_another_class, "is a StableDiffusionXLPipeline; expected a StableDiffusionPipeline"),
    ],
)
def test_directory_of_another_model_is_refused(
    base: Path, tmp_path: Path, damage: Callable[[Path], None], said: str
) -> None:
    other = tmp_path / "other"
    shutil.copytree(base, other)
    damage(other)
    with pytest.raises(CheckpointError) as caught:
        build_network(BackboneConfig(name="sd15", weights=str(other)))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_directory_and_repository_are_refused(tmp_path: Path) -> None:
    for name in (str(tmp_path / "none"), "nobody/has-this-repository"):
        with pytest.raises(CheckpointError, match="expected a StableDiffusionPipeline"):
            PipelineDirectory(name, presets_of("sd15"))


def test_repository_that_was_downloaded_in_part_is_found(tmp_path: Path) -> None:
    """diffusers leaves out what no pipeline reads; the library records what else there is."""
    revision = "0" * 40
    repository = tmp_path / "models--owner--name"
    snapshot = repository / "snapshots" / revision
    for file, text in {
        repository / "refs" / "main": revision,
        snapshot / "model_index.json": "{}",
        repository / "trees" / f"{revision}.json": json.dumps(
            {
                "format_version": 1,
                "files": {
                    name: {"size": 2, "blob_id": "0"} for name in ("README.md", "model_index.json")
                },
            }
        ),
    }.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    program = (
        "from d2i.models.pipeline_dir import local_directory\n"
        "print(local_directory('owner/name', 'pipeline', '--weights DIR'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"HF_HUB_CACHE": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == str(snapshot), done.stderr[-1000:]


def test_network_is_that_of_directory_with_its_numbers(base: Path) -> None:
    network = build_network(BackboneConfig(name="sd15", weights=str(base), latent_size=16))
    directory = PipelineDirectory(str(base), presets_of("sd15"))
    assert directory.network_sha256() == weights_hash(network)
    assert network.latent_size == 16
    assert network.latent_scale == pytest.approx(0.18215)
    assert network.downsampling == 8


def test_sha256_is_that_of_weights_not_of_their_file(base: Path, tmp_path: Path) -> None:
    """The same numbers in two files, and stored in half precision where they fit."""
    other = tmp_path / "other"
    shutil.copytree(base, other)
    file = other / "unet" / "diffusion_pytorch_model.safetensors"
    state = {name: tensor.half() for name, tensor in load_file(file).items()}
    save_file({name: tensor.float() for name, tensor in state.items()}, file)
    whole = PipelineDirectory(str(other), presets_of("sd15")).network_sha256()
    file.unlink()
    names = sorted(state)
    parts = {"a.safetensors": names[:9], "b.safetensors": names[9:]}
    for part, held in parts.items():
        save_file({name: state[name] for name in held}, file.with_name(part))
    weight_map = {name: part for part, held in parts.items() for name in held}
    index = file.with_name(f"{file.name}.index.json")
    index.write_text(json.dumps({"weight_map": weight_map}))
    directory = PipelineDirectory(str(other), presets_of("sd15"))
    assert directory.network_sha256() == whole
    assert dict(directory.network_weights())["conv_in.bias"].dtype == torch.float16
