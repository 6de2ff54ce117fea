"""Settings of a system: its text and the choice of `d2i select`, overridden by the command's.

Records who chose the guidance scale, because a tuned scale scores better. Must not import torch.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from d2i.backbones import presets_of
from d2i.errors import ConfigError
from d2i.io import storage
from d2i.recipes import refuse_host
from d2i.run_dir import BEST_NAME, load_selection, read_choice, read_recipe

_ORIGIN_KEYS = ("metric", "value", "num_instances", "seed")


@dataclass(frozen=True)
class Choice:
    """Settings to generate images with, and the source of their guidance scale.

    Args:
        settings: In the form of `--set`: those that a run brings, those of `d2i select`, then those
            of the command.
        guidance_by: `how`: `given` (a setting of the command), `select` (`d2i select`, with
            `metric`, `value`, `num_instances` and `seed` of its choice) or `recipe`.
    """

    settings: list[str]
    guidance_by: dict[str, Any]


def choose_settings(
    system: str,
    given: Sequence[str],
    selected: str | None = None,
    *,
    weights: str | None = None,
    adapter: str | None = None,
) -> Choice:
    """Override a run's text, and the choice of `d2i select`, with the settings of the command.

    A run reads a dialog as it was trained to; a Divter's captioner, as the data were prepared.

    The choice for a run is read from the run directory, also where a Divter generates with that
    run. It holds for one kind of weights: if the command's `sample.weights` names another kind,
    the whole choice is ignored, including its guidance scale.

    Args:
        system: As in `--system`.
        given: The settings of the command.
        selected: Directory that `d2i select --system` wrote to, for a system other than a run.
        weights: As in `--weights`.
        adapter: As in `--adapter`.

    Raises:
        ConfigError: If the choice is damaged, is for another system, other weights or another
            adapter, or its weights are missing.
    """
    kind, _, target = system.partition(":")
    files = generation_weights(weights, adapter)
    if kind == "run":
        choice = _chosen(system, given, selected, files)
        return replace(choice, settings=[*_settings_of_run(target), *choice.settings])
    return _chosen(system, given, selected, files)


def _chosen(
    system: str, given: Sequence[str], selected: str | None, files: dict[str, str | None]
) -> Choice:
    kind, _, target = system.partition(":")
    if kind == "divter":
        return _chosen(target.partition(",")[2], given, selected, files)
    chosen: list[str] = []
    origin: dict[str, Any] = {"how": "recipe"}
    if kind == "run" and (best := load_selection(target)):
        if _value("sample.weights", given) in (None, best.weights_kind):
            chosen, origin = best.settings(), _origin(read_choice(target))
    elif selected is not None:
        content = _read_selected(selected, system, files)
        chosen, origin = list(content["settings"]), _origin(content)
    setting = "sample.pipeline" if kind == "diffusers" else "sample.guidance_scale"
    if _value(setting, given) is not None:
        origin = {"how": "given"}
    return Choice([*chosen, *given], origin)


def _settings_of_run(run_url: str) -> list[str]:
    """Return the text that a run was trained on, and its sampling where data may not suit it."""
    run = read_recipe(run_url)
    is_pipeline = presets_of(run.backbone.name).pipeline is not None
    # A pipeline encodes its text itself, in whatever form the data hold theirs.
    left_out = {"latents", "encode"} if is_pipeline and run.text.encode == "stored" else set()
    text = run.text.model_dump(mode="json", exclude=left_out)
    values = {f"text.{name}": value for name, value in text.items()}
    if is_pipeline:
        for name in ("sampler", "num_steps", "guidance_scale"):
            values[f"sample.{name}"] = getattr(run.sample, name)
    elif run.text.encode == "on_the_fly":
        for name in ("clip_text", "text_prefix"):
            values[f"encoders.{name}"] = value = getattr(run.encoders, name)
            if value:
                refuse_host(f"encoders.{name} of {run_url}", value, f"--set encoders.{name}=URL")
    return [f"{name}={json.dumps(value)}" for name, value in values.items()]


def generation_weights(weights: str | None, adapter: str | None) -> dict[str, str | None]:
    """Return the weights and the adapter that a choice is for, beside the system's name."""
    return {
        "weights": storage.absolute(weights) if weights else None,
        "adapter": storage.absolute(adapter) if adapter else None,
    }


def _value(name: str, settings: Sequence[str]) -> str | None:
    """Return the last value of a setting, or None if it is not set."""
    values = (setting.partition("=") for setting in settings)
    return next((value for key, _, value in reversed(list(values)) if key == name), None)


def _origin(best: dict[str, Any]) -> dict[str, Any]:
    return {"how": "select"} | {name: best.get(name) for name in _ORIGIN_KEYS}


def _read_selected(directory: str, system: str, files: dict[str, str | None]) -> dict[str, Any]:
    """Read the choice of `d2i select --system`, and check that it is for this system and files."""
    try:
        best = read_choice(directory)
        of, settings = best["system"], best["settings"]
    except (OSError, KeyError) as err:
        raise ConfigError(
            f"--selected {directory}: cannot read its {BEST_NAME}; expected a directory written by "
            "d2i select --system; repeat that command"
        ) from err
    kind, colon, place = system.partition(":")
    named = f"{kind}:{storage.absolute(place)}" if colon else kind
    if of != named or not isinstance(settings, list):
        raise ConfigError(
            f"--selected {directory}: its settings were selected for {of}, got {named}; repeat d2i "
            "select for it"
        )
    for name, file in files.items():
        if best.get(name, file) != file:
            raise ConfigError(
                f"--selected {directory}: its settings were selected with --{name} {best[name]}, "
                f"got {file}; give the same, or repeat d2i select with --{name} {file}"
            )
    return best
