"""What a system is drawn with: what `d2i select` chose, and the command's settings over it.

Who chose a guidance scale is kept: one that was searched for scores better. Must not import torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from d2i import storage
from d2i.errors import ConfigError
from d2i.run_dir import BEST_NAME, load_selection, read_choice

_SAID = ("metric", "value", "num_instances", "seed")


@dataclass(frozen=True)
class Choice:
    """Settings to draw with, and where the guidance scale among them comes from.

    Args:
        settings: As `--set` takes them: those of `d2i select`, then those of the command.
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
    """Put the command's settings over what `d2i select` chose for a system.

    The choice for a run is found in the run, also where a Divter draws with it; it is of one kind
    of weights, so that `sample.weights` of another sets it aside, its guidance with it.

    Args:
        system: As `--system` takes it.
        given: The settings of the command.
        selected: Folder that `d2i select --system` wrote to, for a system other than a run.
        weights: As `--weights` takes it.
        adapter: As `--adapter` takes it.

    Raises:
        ConfigError: If the choice is damaged, or of another system, other weights or another
            adapter, or its weights are gone.
    """
    kind, _, target = system.partition(":")
    if kind == "divter":
        inner = target.partition(",")[2]
        return choose_settings(inner, given, selected, weights=weights, adapter=adapter)
    chosen: list[str] = []
    said: dict[str, Any] = {"how": "recipe"}
    if kind == "run" and (best := load_selection(target)):
        if _value("sample.weights", given) in (None, best.weights_kind):
            chosen, said = best.settings(), _said(read_choice(target))
    elif selected is not None:
        content = _read_selected(selected, system, generation_weights(weights, adapter))
        chosen, said = list(content["settings"]), _said(content)
    setting = "sample.pipeline" if kind == "diffusers" else "sample.guidance_scale"
    if _value(setting, given) is not None:
        said = {"how": "given"}
    return Choice([*chosen, *given], said)


def generation_weights(weights: str | None, adapter: str | None) -> dict[str, str | None]:
    """Return which files a choice is for, beside the system's name."""
    return {
        "weights": storage.absolute(weights) if weights else None,
        "adapter": storage.absolute(adapter) if adapter else None,
    }


def _value(name: str, settings: Sequence[str]) -> str | None:
    """Return the last value that settings give to a name."""
    values = (setting.partition("=") for setting in settings)
    return next((value for key, _, value in reversed(list(values)) if key == name), None)


def _said(best: dict[str, Any]) -> dict[str, Any]:
    return {"how": "select"} | {name: best.get(name) for name in _SAID}


def _read_selected(folder: str, system: str, files: dict[str, str | None]) -> dict[str, Any]:
    """Read what `d2i select --system` chose, and make sure that it is for this system and files."""
    try:
        best = read_choice(folder)
        of, settings = best["system"], best["settings"]
    except (OSError, KeyError) as err:
        raise ConfigError(
            f"--selected {folder}: {BEST_NAME} there cannot be read; expected what d2i select "
            "--system wrote; repeat that command"
        ) from err
    kind, colon, place = system.partition(":")
    named = f"{kind}:{storage.absolute(place)}" if colon else kind
    if of != named or not isinstance(settings, list):
        raise ConfigError(
            f"--selected {folder}: was chosen for {of}, got {named}; repeat d2i select for it"
        )
    for name, file in files.items():
        if best.get(name, file) != file:
            raise ConfigError(
                f"--selected {folder}: was chosen with --{name} {best[name]}, got {file}; repeat "
                "d2i select with it"
            )
    return best
