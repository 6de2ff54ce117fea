"""The backbones by name: a line for each family of networks, and the sizes of its presets.

A family is a directory of `d2i.models`. Its `presets` module is read by commands that load no
network, so it must not import torch; its `family` module is what trains and generates.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from d2i.errors import ConfigError

FAMILIES = {
    "uvit": "d2i.models.uvit",
    "unidiffuser": "d2i.models.unidiffuser",
    "sd15": "d2i.models.sd15",
    "sdxl": "d2i.models.sdxl",
    "z-image": "d2i.models.z_image",
    "flux2-klein": "d2i.models.flux2_klein",
    "sana": "d2i.models.sana",
    "flux1": "d2i.models.flux1",
    "qwen-image": "d2i.models.qwen_image",
    "sd3": "d2i.models.sd3",
}
"""The package of each family, by the family's name."""
NOISE_WEIGHTINGS = ("none", "min_snr_5")
"""The weightings of noise levels for networks that predict noise."""
FLOW_WEIGHTINGS = ("none", "sigma_sqrt", "cosmap")
"""Those for networks that predict velocities."""


def _nothing(recipe: Any) -> dict[str, Any]:
    del recipe
    return {}


def _no_problem(recipe: Any) -> str | None:
    del recipe
    return None


@dataclass(frozen=True)
class Presets:
    """The part of a family that needs no torch.

    Args:
        sizes: The arguments of each published network, by the backbone's name; those that a recipe
            may override.
        unset: From a recipe to the settings that this family needs where the user left them unset,
            such as `{"train.condition_dropout": 0.0}`.
        problem: From a recipe to what is wrong with it for this family, in one line; else None.
        pipeline: The class of diffusers' pipeline whose network is trained, and which generates
            with it; None if d2i's own sampler does. Its directory then gives all other sizes.
        network: The class of diffusers' network.
        network_part: The part of that pipeline which is trained, such a network.
        is_flow: True if that network predicts velocities, else it predicts noise.
        multiple_of: Pixels that a side of an image must be a multiple of.
        report: The source of the objective that the technical report gives, where it differs from
            the published script's; None if there is none.
        call_options: Arguments of that pipeline's call that differ from its defaults.
        distilled: A base model for each mark in a name that says "distilled for few steps", which
            training would undo.
        lora_targets: Names of the layers that a LoRA adapts; empty if the family takes none.
        stores_text: True if shards can hold the text that its networks are given.
        chat: The options with which the pipeline fills in the chat template of its text encoder;
            None if that has no chat template, or the pipeline does not use it.
        published_licence: The licence of the published weights, in words: a hint, where the
            directory of a base model does not name its own.
    """

    sizes: Mapping[str, Mapping[str, Any]]
    unset: Callable[[Any], dict[str, Any]] = _nothing
    problem: Callable[[Any], str | None] = _no_problem
    pipeline: str | None = None
    network: str = "UNet2DConditionModel"
    network_part: str = "unet"
    is_flow: bool = False
    multiple_of: int = 8
    report: str | None = None
    call_options: Mapping[str, Any] = field(default_factory=dict)
    distilled: Mapping[str, str] = field(default_factory=dict)
    lora_targets: tuple[str, ...] = ()
    stores_text: bool = True
    chat: Mapping[str, Any] | None = None
    published_licence: str | None = None


def pipeline_settings(recipe: Any, guidance_scale: float) -> dict[str, Any]:
    """Return what a pipeline's backbone needs where a recipe leaves it unset.

    Data are encoded with the pipeline's own models, and images generated as it does by default.

    Args:
        recipe: The recipe; its `backbone.weights` name the pipeline.
        guidance_scale: The default of the pipeline.
    """
    settings: dict[str, Any] = {
        "sample.sampler": "pipeline",
        "sample.guidance_scale": guidance_scale,
        "text.cut": "turn",
    }
    if base := recipe.backbone.weights:
        settings |= {"encoders.vae": f"{base}/vae", "encoders.clip_text": f"{base}/text_encoder"}
    return settings


def flow_settings(recipe: Any, guidance_scale: float, factor: int) -> dict[str, Any]:
    """Return what a flow transformer's backbone needs where a recipe leaves it unset.

    Text is encoded while training, as no shard holds the states of a language model; everything
    is in bfloat16 and at the mean of the latents, as published.

    Args:
        recipe: The recipe; its `backbone.weights` name the pipeline.
        guidance_scale: The default of the pipeline.
        factor: Pixels to a raw latent pixel, along a side.
    """
    settings: dict[str, Any] = {
        "backbone.latent_size": recipe.image.resolution // factor,
        "encoders.clip_text": None,
        "sample.sampler": "pipeline",
        "sample.guidance_scale": guidance_scale,
        "sample.precision": "bf16",
        "text.encode": "on_the_fly",
        "text.latents": "none",
        "train.latents": "mean",
        "train.text_encoder_precision": "bf16",
    }
    if base := recipe.backbone.weights:
        settings["encoders.vae"] = f"{base}/vae"
    return settings


def presets_of_family(family: str) -> Presets:
    """Return what a family declares."""
    presets: Presets = importlib.import_module(f"{FAMILIES[family]}.presets").PRESETS
    return presets


def presets_of_pipeline(kind: str) -> Presets | None:
    """Return what the family of a pipeline declares, by the pipeline's class; None if unknown."""
    found = map(presets_of_family, FAMILIES)
    return next((presets for presets in found if presets.pipeline == kind), None)


@cache
def backbones() -> dict[str, str]:
    """Return the family of every backbone, by the backbone's name."""
    return {name: family for family in FAMILIES for name in presets_of_family(family).sizes}


def family_of(backbone: str) -> str:
    """Return the family of a backbone.

    Raises:
        ConfigError: If there is no such backbone.
    """
    known = backbones()
    if backbone not in known:
        raise ConfigError(unknown("backbone", backbone, known))
    return known[backbone]


def presets_of(backbone: str) -> Presets:
    """Return what the family of a backbone declares.

    Raises:
        ConfigError: If there is no such backbone.
    """
    return presets_of_family(family_of(backbone))


def recipe_problem(recipe: Any) -> str | None:
    """Return what is wrong with a recipe for its backbone, in one line; else None."""
    name, presets = recipe.backbone.name, presets_of(recipe.backbone.name)
    if recipe.adapter.kind and not presets.lora_targets:
        takers = [b for b in backbones() if presets_of(b).lora_targets]
        return f"adapter.kind: {name} takes no adapter; expected one of {', '.join(takers)}"
    weightings = FLOW_WEIGHTINGS if presets.is_flow else NOISE_WEIGHTINGS
    if recipe.train.weighting not in weightings:
        return (
            f"train.weighting={recipe.train.weighting}: expected one of {', '.join(weightings)} "
            f"for {name}, which predicts {'velocities' if presets.is_flow else 'noise'}"
        )
    if recipe.train.objective == "report" and not presets.report:
        return (
            f"train.objective=report: no technical report of {name} says another objective than "
            "its published script; expected script"
        )
    if recipe.encoders.clip_text is None:
        if presets.stores_text:
            return (
                f"encoders.clip_text=null: {name} reads CLIP's text; expected a CLIP text encoder"
            )
        if recipe.text.latents == "full" or recipe.text.encode == "stored":
            return (
                "encoders.clip_text=null: without it no text is stored; expected text.latents=none "
                "and text.encode=on_the_fly"
            )
    if presets.is_flow and recipe.text.cut == "turn":
        return (
            f"text.cut=turn counts CLIP's tokens, and {name} does not read them; expected token: "
            "its own text encoder cuts what is too long, between words"
        )
    if presets.pipeline and (problem := _pipeline_problem(recipe, presets)):
        return problem
    return presets.problem(recipe)


def chat_problem(recipe: Any) -> str | None:
    """Return the reason why a backbone cannot read its text as a chat, in one line; else None."""
    name, text = recipe.backbone.name, recipe.text
    if text.format == "line":
        if text.roles == "permuted":
            return "text.roles=permuted: a line has no roles; expected text.format=chat"
        return None
    if presets_of(name).chat is None:
        takers = [b for b in backbones() if presets_of(b).chat is not None]
        return (
            f"text.format=chat: the text encoder of {name} has no chat template; expected "
            f"text.format=line, or one of {', '.join(takers)}"
        )
    if text.encode == "stored":
        return "text.format=chat: shards store no chats; expected text.encode=on_the_fly"
    if recipe.corpus.direction == "first":
        return (
            "text.format=chat: the messages of a chat precede the image; expected "
            "corpus.direction=answer"
        )
    return None


def sampler_problem(backbone: str, sampler: str) -> str | None:
    """Return the reason why a backbone cannot generate with a sampler, in one line; else None."""
    if presets_of(backbone).pipeline is None:
        if sampler == "pipeline":
            return f"sample.sampler=pipeline: {backbone} is no pipeline of diffusers"
    elif sampler != "pipeline" and presets_of(backbone).is_flow:
        return (
            f"sample.sampler={sampler}: {backbone} generates by diffusers' own pipeline and its "
            "flow scheduler; expected pipeline"
        )
    elif sampler != "pipeline" and not sampler.startswith("diffusers:"):
        return (
            f"sample.sampler={sampler}: {backbone} generates by diffusers' own pipeline; "
            "expected pipeline, or a scheduler such as diffusers:DPMSolverMultistepScheduler"
        )
    return None


def _pipeline_problem(recipe: Any, presets: Presets) -> str | None:
    backbone = recipe.backbone
    if strange := backbone.overrides().keys() - presets.sizes[backbone.name].keys():
        return (
            f"backbone.{min(strange)}: the sizes of {backbone.name} stand in its own directory; "
            "remove this setting"
        )
    if recipe.text.num_windows != 1:
        return (
            f"text.num_windows is {recipe.text.num_windows}: {backbone.name} reads one window; "
            "expected 1"
        )
    if recipe.image.resolution % presets.multiple_of:
        return (
            f"image.resolution={recipe.image.resolution}: {backbone.name} reads images of which a "
            f"side is a multiple of {presets.multiple_of} pixels; change --set image.resolution"
        )
    if backbone.weights == "scratch":
        return (
            f"backbone.weights=scratch: {backbone.name} is fine-tuned, not trained from random "
            "weights; expected the directory of a pipeline"
        )
    return None


def unknown(what: str, got: str, known: Collection[str]) -> str:
    """Return the error message for an unknown name, with the nearest known one if there is any."""
    if not known:
        return f"unknown {what} {got!r}: there are none; remove it"
    nearest = difflib.get_close_matches(got, known, n=1, cutoff=0.0)[0]
    return f"unknown {what} {got!r}: expected one of {', '.join(known)}; did you mean {nearest!r}?"
