"""The systems that can be evaluated: what `--system` names, made ready to draw pictures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from d2i import storage
from d2i.config import BackboneConfig, BackboneName, Recipe
from d2i.errors import ConfigError
from d2i.runs import EMA_NAME, read_recipe


@dataclass(frozen=True)
class SystemSpec:
    """A system by name, before anything is loaded.

    Args:
        name: As given: `run:DIR` or a backbone's name.
        label: What a table calls it.
        backbone: The network and the weights it is drawn with.
        run_dir: The run it comes from, or None.
    """

    name: str
    label: str
    backbone: BackboneConfig
    run_dir: str | None


def parse_system(system: str, weights: str | None, recipe: Recipe) -> SystemSpec:
    """Read `--system` and `--weights`.

    Raises:
        ConfigError: If there is no such system, or a backbone was given no weights.
        CheckpointError: If `run:DIR` is no run.
    """
    kind, _, rest = system.partition(":")
    if kind == "run" and rest:
        return _run_system(system, Path(rest).expanduser())
    if system in get_args(BackboneName):
        return _backbone_system(system, weights, recipe)
    raise ConfigError(
        f"--system {system}: no such system; expected run:DIR or one of "
        f"{', '.join(get_args(BackboneName))} with --weights"
    )


def _run_system(system: str, run_dir: Path) -> SystemSpec:
    trained = read_recipe(run_dir).backbone
    run_dir = run_dir.absolute()
    weights = run_dir / EMA_NAME
    if not weights.exists():
        raise ConfigError(
            f"--system {system}: {weights} is not there; expected a finished run; "
            "repeat its d2i train command to finish it"
        )
    backbone = trained.model_copy(update={"weights": str(weights)})
    return SystemSpec(f"run:{run_dir}", f"{trained.name}, fine-tuned", backbone, str(run_dir))


def _backbone_system(system: str, weights: str | None, recipe: Recipe) -> SystemSpec:
    if weights is None:
        raise ConfigError(
            f"--system {system}: a backbone needs weights; give --weights PATH "
            "(the published file, a model folder, or demo:backbone)"
        )
    sizes = recipe.backbone.overrides() if recipe.backbone.name == system else {}
    weights = storage.resolve(weights) if Path(weights).exists() else weights
    values = {"name": system, "weights": weights} | sizes
    return SystemSpec(
        system, f"{system}, not fine-tuned", BackboneConfig.model_validate(values), None
    )
