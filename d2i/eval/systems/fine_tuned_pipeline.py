"""A run that fine-tuned the network of a diffusers pipeline, or its base model before that.

The base model's own pipeline generates, with what was trained in place, so other programs get the
same image from the same files. Noise is d2i's: keyed by the prompt, and shared by all systems whose
latents have one shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from d2i.backbones import Presets, presets_of
from d2i.config import BackboneConfig, Recipe
from d2i.diffusion.draws import SampleDraws
from d2i.diffusion.samplers import draw_noise
from d2i.diffusion.schedulers import with_numbers_of
from d2i.encoders.chat_text import ChatText
from d2i.encoders.pipeline_text import open_chat
from d2i.encoders.pretrained import check_sibling_checksums
from d2i.errors import CheckpointError, ConfigError
from d2i.eval.prompts import Prompt
from d2i.eval.system import CallOptions, Generation, Read, SystemSpec
from d2i.eval.systems.adapter import find_adapter
from d2i.eval.systems.diffusers_pipeline import PipelineSystem, load_pipeline
from d2i.models.pipeline_dir import PipelineDirectory
from d2i.models.pipeline_family import pipeline_family
from d2i.models.weights.load import fill_network, read_described, read_state_dict
from d2i.prompt_text import Message, Role, context_messages, with_omitted
from d2i.run_dir import read_recipe
from d2i.weights_resolve import resolve_weights

# Arguments of a pipeline's call that other settings give.
_GIVEN = {
    "guidance_scale": "sample.guidance_scale",
    "num_inference_steps": "sample.num_steps",
    "height": "backbone.latent_size",
    "width": "backbone.latent_size",
    "latents": "sample.seed",
    "generator": "sample.seed",
}


class FineTunedPipeline(PipelineSystem):
    """The pipeline of a base model, with an adapter or a network that was trained.

    A run's base model is known by the sha256 of its network: that of the recipe is used if it is
    the same, which `--set backbone.weights` may give, else the directory that the run names.

    Args:
        spec: A run, or a backbone with the directory of its pipeline as weights.
        recipe: The settings of text and sampling.
        device: The torch device to run on.

    Raises:
        CheckpointError: If a part is missing, damaged or does not fit, or there is no such base
            model.
        ConfigError: If `sample.pipeline` sets what another setting gives, or the text encoder
            cannot read the chats of `text.format=chat`.
    """

    def __init__(self, spec: SystemSpec, recipe: Recipe, device: str) -> None:
        for name in _GIVEN.keys() & recipe.sample.pipeline.keys():
            raise ConfigError(
                f"sample.pipeline sets {name}; expected it as --set {_GIVEN[name]}=…; remove it "
                "there"
            )
        run = read_recipe(spec.run_dir) if spec.run_dir else None
        backbone = run.backbone if run else spec.backbone
        presets, adapter = presets_of(backbone.name), None
        trained = resolve_weights(spec.backbone.weights or "") if run else None
        base = _find_base(trained, [recipe.backbone, backbone] if run else [backbone])
        pipeline = _load_base(base, presets, recipe)
        if trained and run and run.adapter.kind:
            check_sibling_checksums(Path(trained))
            adapter = find_adapter(trained)
        elif trained:
            network = getattr(pipeline, presets.network_part)
            fill_network(network, read_state_dict(trained), trained)
        super().__init__(pipeline, recipe, device, adapter)
        if adapter:
            self.described = {**self.described, "adapter": adapter.sha256}
        network = getattr(pipeline, presets.network_part)
        side = backbone.latent_size or int(network.config.sample_size)
        self._family = pipeline_family(backbone.name)
        self._shape = self._family.codec.latent_shape(side)
        self._text = recipe.text
        self._chat: ChatText | None = None
        if recipe.text.format == "chat":
            seed, name = recipe.sample.seed, base.name
            self._chat = open_chat(self._pipeline, self._family, recipe.text, seed, device, name)

    def generate_seeded(self, prompts: Sequence[Prompt], options: CallOptions) -> list[Generation]:
        """Generate from text as it is trained on, so that a stock tokenizer gives those ids."""
        return super().generate_seeded([self._cleaned(prompt) for prompt in prompts], options)

    def read(self, prompt: Prompt) -> Read:
        """Return the line or, with `text.format=chat`, the chat in its template."""
        if self._chat is None:
            return super().read(self._cleaned(prompt))
        text, cut = self._chat.write_and_cut(self._messages(prompt), prompt.key)
        # The window drops turns of a chat itself.
        config = self._text.model_copy(update={"cut": "token"})
        return Read(text, self._chat.num_tokens(text), with_omitted(cut, prompt.turns, config))

    def _cleaned(self, prompt: Prompt) -> Prompt:
        return replace(prompt, text=self._family.clean(prompt.text))

    def _sides(self) -> Sequence[int]:
        return [side // self._family.codec.patch_size for side in self._shape[1:]]

    def _prompt_arguments(self, prompts: Sequence[Prompt]) -> dict[str, Any]:
        """Return the encoded chats of prompts, and '' to guide away from, or the lines."""
        if self._chat is None:
            return super()._prompt_arguments(prompts)
        device = str(self._pipeline.device)
        empty = self._family.unconditional(self._pipeline, 1, device)
        chats = [(self._messages(prompt), prompt.key) for prompt in prompts]
        texts = [self._chat.write(*chat) for chat in chats]
        with self._chat.as_given():
            conditions = self._family.encode_prompts(self._pipeline, texts, device)
        unconditional = {name: rows[0] for name, rows in empty.items()}
        return self._family.prompt_arguments(conditions, unconditional)

    def _messages(self, prompt: Prompt) -> Sequence[Message]:
        """Return a prompt's messages; of turns without known roles, all are the user's."""
        roles: list[Role] = ["user"] * len(prompt.turns)
        return prompt.messages or context_messages(prompt.turns, roles, self._text)

    def _noise(self, keys: Sequence[str], seeds: Sequence[int]) -> dict[str, Any]:
        draws = SampleDraws(seeds, keys)
        start = draw_noise(draws, "", self._shape, self._pipeline.device)
        size = self._shape[-1] * self._pipeline.vae_scale_factor
        # Flow pipelines keep their state in float32.
        is_flow = self._family.presets.is_flow
        dtype = torch.float32 if is_flow else self._pipeline.dtype
        steps = draws.generator_seeds(".step")
        return {
            "latents": self._family.patches(start).to(dtype),
            "generator": [torch.Generator("cpu").manual_seed(seed) for seed in steps],
            "num_inference_steps": self._sample.num_steps,
            "guidance_scale": self._sample.guidance_scale,
            "height": size,
            "width": size,
            **self._family.presets.call_options,
        }


def _find_base(trained: str | None, named: Sequence[BackboneConfig]) -> PipelineDirectory:
    """Return the first base model that a file of trained weights was trained on.

    Raises:
        CheckpointError: If there is none; it is about the last one that was named.
    """
    expected = read_described(trained).get("base_sha256") if trained else None
    last = named[-1]
    for backbone in named:
        presets = presets_of(backbone.name)
        if presets.pipeline is None or backbone.name != last.name:
            continue
        try:
            base = PipelineDirectory(backbone.weights or "", presets)
        except CheckpointError:
            if backbone is last:
                raise
            continue
        if expected is None or base.network_sha256() == expected:
            return base
    raise CheckpointError(
        f"{trained} was trained on a base model whose network has sha256 {str(expected)[:16]}…; "
        f"{last.weights} has another; give that base model with --set backbone.weights=DIR"
    )


def _load_base(base: PipelineDirectory, presets: Presets, recipe: Recipe) -> Any:
    import diffusers

    kind = getattr(diffusers, presets.pipeline or "")
    missing: dict[str, Any] = dict.fromkeys(base.missing_options())
    if "safety_checker" in missing:
        missing["requires_safety_checker"] = False
    pipeline = load_pipeline(kind, str(base.path), recipe.sample.precision, **missing)
    pipeline.scheduler = with_numbers_of(pipeline.scheduler, recipe.sample.sampler)
    return pipeline
