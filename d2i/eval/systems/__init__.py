"""The registry of systems that can be evaluated: parses `--system` and builds the system."""

from __future__ import annotations

import dataclasses
import importlib
import logging
from collections.abc import Callable
from pathlib import Path

from d2i.backbones import backbones, presets_of, sampler_problem
from d2i.config import BackboneConfig, Recipe, WeightsKind
from d2i.errors import ConfigError
from d2i.eval.system import System, SystemContext, SystemSpec
from d2i.eval.systems.adapter import find_adapter
from d2i.io import storage
from d2i.run_dir import load_selection, read_recipe, result_names
from d2i.weights_catalog import weights_to_fetch
from d2i.weights_resolve import is_shipped

_BACKBONES = tuple(backbones())
# A module is imported only when its system is used.
_BUILDERS = {
    "run": "d2i.eval.systems.backbone:build",
    **dict.fromkeys(_BACKBONES, "d2i.eval.systems.backbone:build"),
    "diffusers": "d2i.eval.systems.diffusers_pipeline:build",
    "unclip": "d2i.eval.systems.diffusers_pipeline:build_unclip",
    "images": "d2i.eval.systems.images:build",
    "retrieve": "d2i.eval.systems.retrieve:build",
    "divter": "d2i.eval.systems.divter:build",
}
_LABELS = {"unclip": "unCLIP (Karlo)", "retrieve": "nearest training picture", "divter": "Divter"}


def parse_system(
    system: str, weights: str | None, recipe: Recipe, adapter: str | None = None
) -> SystemSpec:
    """Parse `--system`, `--weights` and `--adapter`.

    Raises:
        ConfigError: If there is no such system or adapter, a backbone has no weights, a run has
            none of the kind that the recipe's `sample.weights` names, or the system takes no
            adapter.
        CheckpointError: If `run:DIR` is not a run.
    """
    spec = _parse(system, weights, recipe)
    _check_sampler(spec, recipe)
    return spec if adapter is None else _adapted(spec, adapter)


def _check_sampler(spec: SystemSpec, recipe: Recipe) -> None:
    """Check that the system can use the sampler, which may come from the data's recipe."""
    if spec.inner:
        _check_sampler(spec.inner, recipe)
    if spec.network is None:
        return
    name, sampler = spec.network.name, recipe.sample.sampler
    if problem := sampler_problem(name, sampler):
        own = {"sample.sampler": "dpm_solver"} | presets_of(name).unset(recipe)
        settings = [f"--set {key}={own[key]}" for key in own if key.startswith("sample.")]
        raise ConfigError(f"--system {spec.name}: {problem}; give {' '.join(settings)}")


def _parse(system: str, weights: str | None, recipe: Recipe) -> SystemSpec:
    kind, _, target = system.partition(":")
    if kind in _BACKBONES and not target:
        return _backbone(system, weights, recipe)
    if kind in _BUILDERS and target:
        return _PARSERS.get(kind, _by_path)(system, target, weights, recipe)
    if target and _is_plugin(kind, target):
        return SystemSpec(system, target)
    raise ConfigError(
        f"--system {system}: unknown system; expected run:DIR, diffusers:PATH, unclip:PATH, "
        "images:DIR, retrieve:DIR, divter:DIR,SYSTEM, your own function as package.module:NAME, "
        f"or one of {', '.join(_BACKBONES)} with --weights"
    )


def build_system(context: SystemContext) -> System:
    """Build a system, in the process where it generates images.

    Raises:
        D2IError: If any of its parts is missing or invalid.
    """
    spec = context.spec
    module, _, name = _BUILDERS.get(spec.kind, f"{spec.kind}:{spec.target}").partition(":")
    build: Callable[[SystemContext], System] = getattr(importlib.import_module(module), name)
    return build(context)


def _run(system: str, target: str, weights: str | None, recipe: Recipe) -> SystemSpec:
    del weights
    run_url = storage.resolve(target)
    run = read_recipe(run_url)
    trained = run.backbone
    path = _weights_of_run(system, run_url, recipe.sample.weights)
    network = trained.model_copy(update={"weights": path})
    how = "trained from scratch" if trained.is_random else "fine-tuned"
    if run.adapter.kind:
        how = f"LoRA of rank {run.adapter.rank}"
    label = f"{_title(trained, trained)}, {how}"
    return SystemSpec(f"run:{run_url}", label, network)


def _weights_of_run(system: str, run_url: str, kind: WeightsKind) -> str:
    """Return the weights that d2i select chose, if of this kind, else the run's last of it."""
    best = load_selection(run_url, logging.getLogger(__name__).warning)
    if best and best.weights_kind == kind:
        return best.weights
    names = result_names(read_recipe(run_url))
    path = storage.join(run_url, names[kind])
    if storage.exists(path):
        return path
    there = [name for name in names.values() if storage.exists(storage.join(run_url, name))]
    if there:
        raise ConfigError(
            f"--system {system}: sample.weights is {kind}, but {path} does not exist; the run has "
            f"{', '.join(there)}; choose one of them, such as --set sample.weights=ema"
        )
    raise ConfigError(
        f"--system {system}: {path} does not exist; expected a finished run; repeat its d2i train "
        "command to finish it"
    )


def _backbone(system: str, weights: str | None, recipe: Recipe) -> SystemSpec:
    from d2i.models.model_dir import resolve_sizes

    if weights is None:
        raise ConfigError(
            f"--system {system}: got no weights; expected {weights_to_fetch(system)}, a model "
            "directory, or demo:backbone; pass --weights PATH"
        )
    sizes = recipe.backbone.overrides() if recipe.backbone.name == system else {}
    values = {"name": system, "weights": storage.absolute(weights)} | sizes
    network = BackboneConfig.model_validate(values)
    is_here = storage.local_path(network.weights or "") is not None
    title = _title(network, resolve_sizes(network) if is_here else network)
    return SystemSpec(system, f"{title}, not fine-tuned", network)


def _title(start: BackboneConfig, sized: BackboneConfig) -> str:
    """Title a network by its initial weights if they are the demo's, else by its sizes."""
    from d2i.models import name_sizes

    if start.weights and is_shipped(start.weights):
        return "demo network"
    return name_sizes(start.name, sized.overrides())


def _by_path(system: str, target: str, weights: str | None, recipe: Recipe) -> SystemSpec:
    del weights, recipe
    kind, place = system.partition(":")[0], storage.absolute(target)
    label = _LABELS.get(kind, Path(place).name)
    return SystemSpec(f"{kind}:{place}", label)


def _divter(system: str, target: str, weights: str | None, recipe: Recipe) -> SystemSpec:
    describer, comma, generator = target.partition(",")
    if not comma:
        raise ConfigError(
            f"--system {system}: got no comma; expected divter:DIR,SYSTEM: the captioner's "
            "directory, and the system that generates images from its captions"
        )
    inner = _parse(generator, weights, recipe)
    name = f"divter:{storage.absolute(describer)},{inner.name}"
    return SystemSpec(name, _LABELS["divter"], inner=inner)


def _adapted(spec: SystemSpec, adapter: str) -> SystemSpec:
    """Add an adapter to a diffusers pipeline, or to the one inside a Divter."""
    if spec.inner:
        return dataclasses.replace(spec, inner=_adapted(spec.inner, adapter))
    if spec.kind != "diffusers":
        raise ConfigError(
            f"--adapter {adapter}: {spec.name} takes no adapter; expected --system diffusers:PATH "
            "with the base model that the LoRA was trained on"
        )
    found = find_adapter(adapter)
    label = f"{spec.label} + {found.name} ({found.sha256[:8]})"
    return dataclasses.replace(spec, label=label, adapter=found)


def _is_plugin(module: str, name: str) -> bool:
    try:
        return callable(getattr(importlib.import_module(module), name, None))
    except (ImportError, ValueError):
        return False


_PARSERS: dict[str, Callable[..., SystemSpec]] = {"run": _run, "divter": _divter}
