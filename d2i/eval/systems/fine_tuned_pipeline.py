"""A run that fine-tuned the network of a diffusers pipeline, or its base model before that.

The base model's own pipeline generates, with what was trained in place, so other programs get the
same image from the same files. Noise is d2i's: keyed by the prompt, and shared by all systems whose
latents have one shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from safetensors.torch import load_file

from d2i.backbones import presets_of
from d2i.config import BackboneConfig, Recipe
from d2i.diffusion.draws import SampleDraws
from d2i.diffusion.samplers import draw_noise
from d2i.diffusion.schedulers import with_numbers_of
from d2i.errors import CheckpointError
from d2i.eval.prompts import Prompt
from d2i.eval.system import Generation, SystemSpec
from d2i.eval.systems.adapter import Adapter, find_adapter
from d2i.eval.systems.diffusers_pipeline import PipelineSystem, load_pipeline
from d2i.models.pipeline_dir import PipelineDirectory
from d2i.models.registry import family_of_backbone
from d2i.models.weights.load import fill_network, read_described
from d2i.run_dir import read_recipe
from d2i.tokenize import clean
from d2i.weights_resolve import resolve_weights


class FineTunedPipeline(PipelineSystem):
    """The pipeline of a base model, with an adapter or a network that was trained.

    Args:
        spec: A run, or a backbone with the directory of its pipeline as weights.
        recipe: The settings of text and sampling.
        device: The torch device to run on.

    Raises:
        CheckpointError: If a part is missing or does not fit, or the run was trained on another
            base model.
    """

    def __init__(self, spec: SystemSpec, recipe: Recipe, device: str) -> None:
        run = read_recipe(spec.run_dir) if spec.run_dir else None
        backbone = run.backbone if run else spec.backbone
        trained = resolve_weights(spec.backbone.weights or "") if run else None
        pipeline = _load_base(backbone, recipe)
        adapter = None
        if trained and run and run.adapter.kind:
            adapter = _adapter_of(trained, backbone)
        elif trained:
            network = getattr(pipeline, presets_of(backbone.name).network_part)
            fill_network(network, load_file(trained), trained)
        super().__init__(pipeline, recipe, device, adapter)
        if adapter:
            self.described = {**self.described, "adapter": adapter.sha256}
        self._shape = self._latent_shape(backbone)

    def _latent_shape(self, backbone: BackboneConfig) -> tuple[int, int, int]:
        network = getattr(self._pipeline, presets_of(backbone.name).network_part)
        side = backbone.latent_size or int(network.config.sample_size)
        return family_of_backbone(backbone.name).codec.latent_shape(side)

    def generate_seeded(self, prompts: Sequence[Prompt], seeds: Sequence[int]) -> list[Generation]:
        """Generate from cleaned text, so that a stock tokenizer gives the ids of training."""
        cleaned = [replace(prompt, text=clean(prompt.text)) for prompt in prompts]
        return super().generate_seeded(cleaned, seeds)

    def _noise(self, keys: Sequence[str], seeds: Sequence[int]) -> dict[str, Any]:
        draws = SampleDraws(seeds, keys)
        start = draw_noise(draws, "", self._shape, self._pipeline.device)
        size = self._shape[-1] * self._pipeline.vae_scale_factor
        steps = draws.generator_seeds(".step")
        return {
            "latents": start.to(self._pipeline.dtype),
            "generator": [torch.Generator("cpu").manual_seed(seed) for seed in steps],
            "num_inference_steps": self._sample.num_steps,
            "guidance_scale": self._sample.guidance_scale,
            "height": size,
            "width": size,
        }


def _load_base(backbone: BackboneConfig, recipe: Recipe) -> Any:
    import diffusers

    presets = presets_of(backbone.name)
    base = PipelineDirectory(resolve_weights(backbone.weights or ""), presets)
    kind = getattr(diffusers, presets.pipeline or "")
    pipeline = load_pipeline(kind, str(base.path), recipe.sample.precision)
    pipeline.scheduler = with_numbers_of(pipeline.scheduler, recipe.sample.sampler)
    return pipeline


def _adapter_of(trained: str, backbone: BackboneConfig) -> Adapter:
    """Return the adapter of a run, if it was trained on this base model."""
    base = PipelineDirectory(resolve_weights(backbone.weights or ""), presets_of(backbone.name))
    expected, found = read_described(trained).get("base_sha256"), base.network_sha256()
    if expected not in (None, found):
        raise CheckpointError(
            f"{trained} was trained on a base model whose network has sha256 "
            f"{str(expected)[:16]}…; {base.name} has {found[:16]}…; restore that base model"
        )
    return find_adapter(trained)
