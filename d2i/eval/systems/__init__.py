"""The systems that can be evaluated: what `--system` names, and how it is built."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from d2i import storage
from d2i.config import BackboneConfig, BackboneName, Recipe, WeightsKind
from d2i.errors import ConfigError
from d2i.eval.system import System, SystemContext
from d2i.runs import RESULT_NAMES, best_choice, read_recipe

_BACKBONES = get_args(BackboneName)
# A module is imported only when its system is asked for.
_BUILDERS = {
    "run": "d2i.eval.systems.backbone:build",
    **dict.fromkeys(_BACKBONES, "d2i.eval.systems.backbone:build"),
    "diffusers": "d2i.eval.systems.pipeline:build",
    "dalle2": "d2i.eval.systems.pipeline:build_dalle2",
    "images": "d2i.eval.systems.images:build",
    "retrieve": "d2i.eval.systems.retrieve:build",
    "divter": "d2i.eval.systems.divter:build",
}
_LABELS = {"dalle2": "DALL-E 2", "retrieve": "nearest training picture", "divter": "Divter"}


@dataclass(frozen=True)
class SystemSpec:
    """A system by name, before anything is loaded.

    Args:
        name: As given, paths made absolute.
        label: What a table calls it.
        kind: What comes before the colon, or a backbone's name.
        target: What comes after the colon.
        network: The network and the weights it is drawn with, of a run or a backbone.
        run_dir: The run it comes from.
        inner: The system that draws what a Divter describes.
    """

    name: str
    label: str
    kind: str
    target: str = ""
    network: BackboneConfig | None = None
    run_dir: str | None = None
    inner: SystemSpec | None = None

    @property
    def backbone(self) -> BackboneConfig:
        """The network and the weights it is drawn with.

        Raises:
            ConfigError: If this is neither a run nor a backbone.
        """
        if self.network is None:
            raise ConfigError(f"{self.name} has no backbone; expected run:DIR or a backbone's name")
        return self.network


def parse_system(system: str, weights: str | None, recipe: Recipe) -> SystemSpec:
    """Read `--system` and `--weights`.

    Raises:
        ConfigError: If there is no such system, a backbone was given no weights, or a run has none
            of the kind that the recipe's `sample.weights` asks for.
        CheckpointError: If `run:DIR` is no run.
    """
    kind, _, target = system.partition(":")
    if kind in _BACKBONES and not target:
        return _backbone(system, weights, recipe)
    if kind in _BUILDERS and target:
        return _PARSERS.get(kind, _by_place)(system, target, weights, recipe)
    if target and _is_function(kind, target):
        return SystemSpec(system, target, kind, target)
    raise ConfigError(
        f"--system {system}: no such system; expected run:DIR, diffusers:PATH, dalle2:PATH, "
        "images:DIR, retrieve:DIR, divter:DIR,SYSTEM, a function of yours as package.module:NAME, "
        f"or one of {', '.join(_BACKBONES)} with --weights"
    )


def chosen_settings(system: str) -> list[str]:
    """Return what d2i select chose of a run that a system names, as settings; else nothing.

    Raises:
        ConfigError: If what it wrote is damaged, or the weights are gone.
    """
    kind, _, run_url = system.partition(":")
    best = best_choice(run_url) if kind == "run" else None
    return best.settings() if best else []


def build_system(context: SystemContext) -> System:
    """Build a system where it draws.

    Raises:
        D2IError: If what it is made of is not there, or is not what it should be.
    """
    spec = context.spec
    module, _, name = _BUILDERS.get(spec.kind, f"{spec.kind}:{spec.target}").partition(":")
    build: Callable[[SystemContext], System] = getattr(importlib.import_module(module), name)
    return build(context)


def _run(system: str, target: str, weights: str | None, recipe: Recipe) -> SystemSpec:
    del weights
    run_url = storage.resolve(target)
    trained = read_recipe(run_url).backbone
    path = _weights_of_run(system, run_url, recipe.sample.weights)
    network = trained.model_copy(update={"weights": path})
    label = f"{trained.name}, fine-tuned"
    return SystemSpec(f"run:{run_url}", label, "run", run_url, network, run_url)


def _weights_of_run(system: str, run_url: str, kind: WeightsKind) -> str:
    """Return what d2i select chose, if it is of this kind; else the run's last weights of it."""
    best = best_choice(run_url, logging.getLogger(__name__).warning)
    if best and best.weights_kind == kind:
        return best.weights
    path = storage.join(run_url, RESULT_NAMES[kind])
    if storage.exists(path):
        return path
    there = [name for name in RESULT_NAMES.values() if storage.exists(storage.join(run_url, name))]
    if there:
        raise ConfigError(
            f"--system {system}: sample.weights is {kind}, and {path} is not there; the run holds "
            f"{', '.join(there)}; choose one of those, such as --set sample.weights=ema"
        )
    raise ConfigError(
        f"--system {system}: {path} is not there; expected a finished run; "
        "repeat its d2i train command to finish it"
    )


def _backbone(system: str, weights: str | None, recipe: Recipe) -> SystemSpec:
    if weights is None:
        raise ConfigError(
            f"--system {system}: a backbone needs weights; give --weights PATH "
            "(the published file, a model folder, or demo:backbone)"
        )
    sizes = recipe.backbone.overrides() if recipe.backbone.name == system else {}
    values = {"name": system, "weights": _absolute(weights)} | sizes
    network = BackboneConfig.model_validate(values)
    return SystemSpec(system, f"{system}, not fine-tuned", system, network=network)


def _by_place(system: str, target: str, weights: str | None, recipe: Recipe) -> SystemSpec:
    del weights, recipe
    kind, place = system.partition(":")[0], _absolute(target)
    label = _LABELS.get(kind, Path(place).name)
    return SystemSpec(f"{kind}:{place}", label, kind, place)


def _divter(system: str, target: str, weights: str | None, recipe: Recipe) -> SystemSpec:
    describer, comma, drawn_by = target.partition(",")
    if not comma:
        raise ConfigError(
            f"--system {system}: expected divter:DIR,SYSTEM: the description generator's folder, "
            "and the system that draws what it describes"
        )
    inner = parse_system(drawn_by, weights, recipe)
    folder = _absolute(describer)
    name = f"divter:{folder},{inner.name}"
    return SystemSpec(name, _LABELS["divter"], "divter", folder, inner=inner)


def _absolute(place: str) -> str:
    """Return a place that is here as an absolute path, a URL or a hub's name as it is."""
    return storage.resolve(place) if Path(place).expanduser().exists() else place


def _is_function(module: str, name: str) -> bool:
    try:
        return callable(getattr(importlib.import_module(module), name, None))
    except (ImportError, ValueError):
        return False


_PARSERS: dict[str, Callable[..., SystemSpec]] = {"run": _run, "divter": _divter}
