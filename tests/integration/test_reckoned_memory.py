"""The reckoned memory of a training equals the tensors that exist, part by part, to the byte."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from d2i.config import TextConfig, apply_settings
from d2i.encoders import ClipText
from d2i.encoders.pipeline_text import PipelineText
from d2i.models.pipeline_family import pipeline_family
from d2i.models.registry import family_of_backbone
from d2i.recipes import resolve_recipe
from d2i.train.activations import count_activations
from d2i.train.data.text_source import text_encoder_bytes
from d2i.train.memory import MemoryReckoner
from d2i.train.network import build_on_meta, build_trained_network
from tests.integration import fine_tuning
from tests.integration.memory_program import (
    FLOW,
    MICRO_BATCH_SIZE,
    num_bytes,
    objective_of,
    random_batch,
    recipe_of,
    storages,
    zero_of,
)
from tests.integration.pipelines import (
    save_tiny_flux2_klein,
    save_tiny_sana,
    save_tiny_sd15,
    save_tiny_sdxl,
    save_tiny_z_image,
)
from tests.integration.training import run_on_ranks

pytestmark = pytest.mark.timeout(600)
PROGRAM = Path(__file__).with_name("memory_program.py")
QUICK = {
    1: ["uvit:bf16:0", "uvit:bf16:1", "uvit:bf16_weights:2", "full:bf16:3"],
    2: [
        "uvit:bf16:0",
        "uvit:bf16_weights:1",
        "uvit:bf16:2",
        "uvit:bf16:3",
        "lora:bf16:2",
        "z-image:bf16:1",
    ],
}
ALL = [
    f"{network}:{precision}:{stage}"
    for network in ("uvit", "full", "lora", *FLOW)
    for precision in ("fp32", "bf16", "bf16_weights", "fp16_weights")
    for stage in (0, 1, 2, 3)
]
_CLOSE = 0.15
SAVE_FLOW: dict[str, Callable[[Path], None]] = {
    "z-image": save_tiny_z_image,
    "flux2-klein": save_tiny_flux2_klein,
    "sana": save_tiny_sana,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("base") / "sd15"
    save_tiny_sd15(directory)
    for name, save in SAVE_FLOW.items():
        save(directory.parent / name)
    return directory


@pytest.mark.parametrize("num_ranks", [pytest.param(1, marks=pytest.mark.soak), 2])
def test_every_part_equals_tensors_of_engine(base: Path, tmp_path: Path, num_ranks: int) -> None:
    check_cases(QUICK[num_ranks], base, tmp_path, num_ranks)


@pytest.mark.soak
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_every_part_equals_in_every_precision_and_stage(
    base: Path, tmp_path: Path, num_ranks: int
) -> None:
    check_cases(ALL, base, tmp_path, num_ranks)


def check_cases(cases: list[str], base: Path, out: Path, num_ranks: int) -> None:
    run_on_ranks(PROGRAM, num_ranks, out, base, *cases)
    for case in cases:
        network, precision, stage = case.split(":")
        global_batch_size = 2 * MICRO_BATCH_SIZE * num_ranks
        setting = f"train.global_batch_size={global_batch_size}"
        recipe = recipe_of(network, precision, base, setting)
        reckoned = MemoryReckoner(num_ranks, "cpu", zero_of(int(stage))).reckon(recipe)
        files = [out / f"{case}-{rank}.json" for rank in range(num_ranks)]
        found = [json.loads(file.read_text()) for file in files]
        most = {name: max(of_rank[name] for of_rank in found) for name in found[0]}
        assert most == {name: getattr(reckoned, name) for name in most}, case


@pytest.mark.parametrize("is_recomputed", ["false", "true"])
@pytest.mark.parametrize("precision", [pytest.param("fp32", marks=pytest.mark.soak), "bf16"])
@pytest.mark.parametrize("kind", ["uvit", "full", "lora", *FLOW])
def test_activations_are_those_of_real_forward_pass(
    base: Path, kind: str, precision: str, is_recomputed: str
) -> None:
    setting = f"train.activation_checkpointing={is_recomputed}"
    recipe = recipe_of(kind, precision, base, setting)
    network = build_trained_network(recipe)
    batch, objective = random_batch(network, recipe, 3), objective_of(network, recipe)
    expected = saved_bytes(network, lambda: objective(network, batch).mean())
    found = count_activations(recipe, 3, "cpu")
    assert found.kept == pytest.approx(expected, rel=_CLOSE)
    assert (found.recomputed > 0) == (is_recomputed == "true")


def saved_bytes(network: nn.Module, run: Callable[[], object]) -> int:
    """Count what a forward pass saves beside the network's own tensors."""
    held = storages([*network.parameters(), *network.buffers()])
    saved: list[torch.Tensor] = []

    def save(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with saved_tensors_hooks(save, lambda tensor: tensor):
        output = run()
    del output
    return sum(size for place, size in storages(saved).items() if place not in held)


def test_what_is_recomputed_is_what_largest_block_saves(base: Path) -> None:
    recipe = recipe_of("uvit", "fp32", base, "train.activation_checkpointing=true")
    network = build_trained_network(recipe)
    block = list(family_of_backbone(recipe.backbone.name).blocks(network))[-1]
    num_tokens = 1 + network.num_text_tokens + 4
    inputs = [torch.randn(3, num_tokens, 16, requires_grad=True) for _ in range(2)]
    expected = saved_bytes(network, lambda: block(*inputs))
    assert count_activations(recipe, 3, "cpu").recomputed == pytest.approx(expected, rel=_CLOSE)


def test_activations_of_gpu_are_counted_without_one(base: Path) -> None:
    """A GPU's attention keeps no scores, which a CPU keeps in bfloat16."""
    recipe = recipe_of("uvit", "bf16", base)
    on_cpu, on_gpu = (count_activations(recipe, 3, device).kept for device in ("cpu", "cuda"))
    assert 0 < on_gpu < on_cpu


@pytest.mark.parametrize(
    ("save", "name"),
    [
        (save_tiny_sd15, fine_tuning.LORA),
        (save_tiny_sdxl, "sdxl-lora-photochat"),
        (save_tiny_z_image, "z-image-lora-photochat"),
        (save_tiny_flux2_klein, "flux2-klein-lora-photochat"),
        (save_tiny_sana, "sana-photochat"),
    ],
)
def test_text_encoders_of_pipeline_take_reckoned_bytes(
    tmp_path: Path, save: Any, name: str
) -> None:
    directory = tmp_path / "base"
    save(directory)
    given = [f"backbone.weights={directory}", "text.encode=on_the_fly"]
    recipe = resolve_recipe(name, given)
    precision = recipe.train.text_encoder_precision
    family = pipeline_family(recipe.backbone.name)
    text = PipelineText(str(directory), family, TextConfig(), 2, "cpu", precision)
    parts = [m for name, m in text._pipeline.components.items() if "text_encoder" in name]
    # Nothing is loaded, but the numbers that normalise FLUX.2's latents.
    for file in directory.rglob("*.safetensors"):
        if file.parent.name != "vae":
            file.unlink()
    assert text_encoder_bytes(recipe) == sum(module_tensors(part) for part in parts)
    assert list(build_on_meta(recipe).parameters())


def test_language_model_is_freed_where_that_is_enough(base: Path) -> None:
    recipe = recipe_of("flux2-klein", "bf16", base, "train.activation_checkpointing=true")
    reckoner = MemoryReckoner(1, "cuda")
    total = reckoner.reckon(recipe).total
    assert reckoner.settings_that_fit(recipe, total - 1) == ("train.text_encoder_memory=free",)
    freed = apply_settings(recipe, ["train.text_encoder_memory=free"])
    assert reckoner.reckon(freed).total == total - text_encoder_bytes(recipe)


def test_text_encoder_of_stored_tokens_takes_reckoned_bytes(base: Path) -> None:
    recipe = recipe_of("uvit", "bf16", base, "encoders.clip_text=demo:clip_text")
    expected = module_tensors(ClipText("demo:clip_text").module)
    assert text_encoder_bytes(recipe) == 0
    assert text_encoder_bytes(recipe, has_latents=False) == expected
    on_the_fly = recipe_of(
        "uvit", "bf16", base, "encoders.clip_text=demo:clip_text", "text.encode=on_the_fly"
    )
    assert text_encoder_bytes(on_the_fly) == expected


def module_tensors(module: nn.Module) -> int:
    return num_bytes([*module.parameters(), *module.buffers()])
