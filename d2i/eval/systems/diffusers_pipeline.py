"""Any text-to-image pipeline of diffusers, and its unCLIP pipeline, for Karlo."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from d2i.config import Precision, Recipe
from d2i.diffusion.draws import integers
from d2i.diffusion.schedulers import step_arguments
from d2i.encoders.pipeline_text import DTYPES
from d2i.encoders.pretrained import weights_hash
from d2i.encoders.prompt_truncation import PromptTruncation
from d2i.errors import CheckpointError, ConfigError
from d2i.eval.prompts import Prompt
from d2i.eval.system import CallOptions, Generation, Read, SystemContext, expect_line
from d2i.eval.systems.adapter import Adapter, load_adapter
from d2i.prompt_text import with_omitted

_MAX_SEED = 2**62
# The arguments of `Model.generate` behind those of a pipeline's call.
_OPTION_OF = {
    "num_inference_steps": "num_steps",
    "guidance_scale": "guidance_scale",
    "callback_on_step_end": "on_step",
}


def build(context: SystemContext) -> PipelineSystem:
    """Load `diffusers:PATH_OR_REPO` by the class that its `model_index.json` names."""
    from diffusers import DiffusionPipeline

    return _system(context, _load(DiffusionPipeline, context))


def build_unclip(context: SystemContext) -> PipelineSystem:
    """Load `unclip:PATH_OR_REPO`: a prior and decoders as diffusers' UnCLIPPipeline saves them.

    Loads part by part, because `model_index.json` names a class by a module it has moved from.
    """
    import diffusers
    import transformers
    from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel

    networks = {
        "prior": diffusers.PriorTransformer,
        "decoder": diffusers.UNet2DConditionModel,
        "text_encoder": transformers.CLIPTextModelWithProjection,
        "text_proj": UnCLIPTextProjModel,
        "super_res_first": diffusers.UNet2DModel,
        "super_res_last": diffusers.UNet2DModel,
    }
    others = {
        "tokenizer": transformers.CLIPTokenizer,
        "prior_scheduler": diffusers.UnCLIPScheduler,
        "decoder_scheduler": diffusers.UnCLIPScheduler,
        "super_res_scheduler": diffusers.UnCLIPScheduler,
    }
    name = context.spec.target
    parts = {part: _load(kind, context, subfolder=part) for part, kind in networks.items()}
    parts |= {part: _load_plain(kind, name, subfolder=part) for part, kind in others.items()}
    return _system(context, diffusers.UnCLIPPipeline(**parts))


def _system(context: SystemContext, pipeline: Any) -> PipelineSystem:
    expect_line(context)
    return PipelineSystem(pipeline, context.recipe, context.device, context.spec.adapter)


class PipelineSystem:
    """Passes the line of a prompt to a pipeline, with a random generator keyed by the prompt.

    The pipeline runs with its own defaults except for `sample.pipeline`, in `sample.precision`, and
    at the recipe's fixed, padded batch size. A line that is too long for a text encoder is
    truncated; `text.keep` decides which end stays.

    Args:
        pipeline: A pipeline of diffusers.
        recipe: The settings of text and sampling.
        device: The torch device to run on.
        adapter: A LoRA to load into it.
    """

    def __init__(
        self, pipeline: Any, recipe: Recipe, device: str, adapter: Adapter | None = None
    ) -> None:
        self._sample, self._config = recipe.sample, recipe.text
        self._pipeline = pipeline.to(device)
        self._pipeline.set_progress_bar_config(disable=True)
        weights = _hashes(pipeline)
        if adapter:
            load_adapter(pipeline, adapter)
            pipeline.to(device)
        self._reading = PromptTruncation(pipeline, self._sample.pipeline, recipe.text.keep)
        windows = self._reading.windows.items()
        self.described: Mapping[str, Any] = {
            "pipeline": type(pipeline).__name__,
            **weights,
            "text_tokens": {
                name: {"tokens": window.tokens, "dialog_tokens": window.dialog_tokens}
                for name, window in windows
            },
        }

    def generate(self, prompts: Sequence[Prompt]) -> list[Generation]:
        """Generate in padded batches; an image that is withheld or not finite is a failure."""
        return self.generate_seeded(prompts, CallOptions([self._sample.seed] * len(prompts)))

    def generate_seeded(self, prompts: Sequence[Prompt], options: CallOptions) -> list[Generation]:
        """Generate as `generate` does, with the options of this call.

        A step is one of the pipeline's scheduler, and `on_step` is given the pipeline's state after
        it: noised latents at the pipeline's own scale.

        Raises:
            ConfigError: If the pipeline's call takes no such option.
        """
        size = self._sample.compute_batch_size
        jobs = list(zip(prompts, options.seeds, strict=True))
        generations: list[Generation] = []
        for start in range(0, len(jobs), size):
            batch = jobs[start : start + size]
            padded = batch + batch[:1] * (size - len(batch))
            arguments = self._call_arguments(options, len(batch))
            generations += self._generate_batch(padded, arguments)[: len(batch)]
        return generations

    def read(self, prompt: Prompt) -> Read:
        """Return the line as the encoder with the longest window gets it."""
        text, tokens, cut = self._reading.split(prompt.text)
        return Read(text, tokens, with_omitted(cut, prompt.turns, self._config))

    def _call_arguments(self, options: CallOptions, num_images: int) -> dict[str, Any]:
        """Return the arguments of the pipeline's call that options of this call set."""
        chosen = {
            "num_inference_steps": options.num_steps,
            "guidance_scale": options.guidance_scale,
        }
        arguments = {name: value for name, value in chosen.items() if value is not None}
        arguments |= step_arguments(options.on_step, num_images, self._sides())
        taken = inspect.signature(self._pipeline.__call__).parameters
        for name in arguments.keys() - taken.keys():
            raise ConfigError(
                f"{type(self._pipeline).__name__} takes no {name}; expected a pipeline that does; "
                f"leave out {_OPTION_OF[name]}"
            )
        return arguments

    def _sides(self) -> Sequence[int] | None:
        """Return height and width of the latents, if they are known."""
        return None

    @torch.inference_mode()
    def _generate_batch(
        self, jobs: Sequence[tuple[Prompt, int]], arguments: Mapping[str, Any]
    ) -> list[Generation]:
        prompts = [prompt for prompt, _ in jobs]
        keys = [prompt.key for prompt in prompts]
        done = self._pipeline(
            **self._prompt_arguments(prompts),
            output_type="np",
            **self._noise(keys, [seed for _, seed in jobs])
            | self._sample.pipeline
            | dict(arguments),
        )
        withheld = getattr(done, "nsfw_content_detected", None) or [False] * len(prompts)
        return [
            _generation(image, is_withheld=w)
            for image, w in zip(done.images, withheld, strict=True)
        ]

    def _prompt_arguments(self, prompts: Sequence[Prompt]) -> dict[str, Any]:
        """Return the pipeline's arguments that say what to generate."""
        return {"prompt": [self._reading.read(prompt.text) for prompt in prompts]}

    def _noise(self, keys: Sequence[str], seeds: Sequence[int]) -> dict[str, Any]:
        """Return the pipeline's arguments that decide an image's noise, and its sampling."""
        drawn = [
            int(integers(0, _MAX_SEED, seed, "sample.pipeline", [key], 0)[0])
            for key, seed in zip(keys, seeds, strict=True)
        ]
        return {"generator": [torch.Generator("cpu").manual_seed(seed) for seed in drawn]}


def _generation(image: Any, *, is_withheld: bool) -> Generation:
    if is_withheld:
        return Generation(None, "withheld")
    if not np.isfinite(image).all():
        return Generation(None, "not_finite")
    return Generation((np.clip(image, 0, 1) * 255).round().astype(np.uint8))


def _hashes(pipeline: Any) -> dict[str, str]:
    return {
        name: weights_hash(module)
        for name, module in sorted(pipeline.components.items())
        if isinstance(module, torch.nn.Module)
    }


def _load(model_class: Any, context: SystemContext, **options: Any) -> Any:
    return load_pipeline(
        model_class, context.spec.target, context.recipe.sample.precision, **options
    )


def load_pipeline(model_class: Any, name: str, precision: Precision, **options: Any) -> Any:
    """Load a pipeline, or one of its parts, in a precision.

    Args:
        model_class: A class with `from_pretrained`.
        name: A directory that `save_pretrained` wrote, or a repository in the local cache.
        precision: Of its weights.
        **options: Further arguments of `from_pretrained`.

    Raises:
        CheckpointError: If it cannot be loaded.
    """
    # safetensors only: never unpickle weights of a stranger.
    return _load_plain(
        model_class,
        name,
        use_safetensors=True,
        dtype=DTYPES[precision],
        low_cpu_mem_usage=False,
        **options,
    )


def _load_plain(any_class: Any, name: str, **options: Any) -> Any:
    try:
        return any_class.from_pretrained(name, **options)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError) as err:
        reason = str(err).strip().splitlines()[0][:200]
        raise CheckpointError(
            f"{name}: cannot load {any_class.__name__}: {reason}; expected a directory written by "
            "save_pretrained, with safetensors, or a hub repository in the local cache"
        ) from err
