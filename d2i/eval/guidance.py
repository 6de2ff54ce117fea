"""Who chose the guidance scale of an evaluation: one that was searched for scores better.

Must not import torch.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from d2i import storage
from d2i.errors import ConfigError
from d2i.runs import BEST_NAME, best_choice


def read_selected(folder: str, system: str) -> dict[str, Any]:
    """Read what `d2i select --system` chose.

    Args:
        folder: Its `--out`.
        system: The system that is to draw with it, its path absolute.

    Raises:
        ConfigError: If there is no choice, or it is damaged or of another system.
    """
    url = storage.join(folder, BEST_NAME)
    try:
        best: dict[str, Any] = json.loads(storage.read_bytes(url))
        of, _ = str(best["system"]), list(best["settings"])
    except (OSError, ValueError, KeyError, TypeError) as err:
        raise ConfigError(
            f"--selected {folder}: {url} cannot be read; expected what d2i select --system wrote; "
            "repeat that command"
        ) from err
    if of != system:
        raise ConfigError(
            f"--selected {folder}: was chosen for {of}, got {system}; repeat d2i select for it"
        )
    return best


def chosen_by(system: str, settings: Sequence[str], selected: str | None = None) -> dict[str, Any]:
    """Say how a system's guidance scale comes about.

    Args:
        system: As `--system` takes it.
        settings: Those of the command, which outweigh what `d2i select` chose.
        selected: Where `d2i select` wrote its choice for a system that is no run.

    Returns:
        `how`: `given` (a setting of the command), `select` (`d2i select`, with `metric`, `value`,
        `num_instances` and `seed` of its choice) or `recipe`.

    Raises:
        ConfigError: If what `d2i select` wrote is damaged.
    """
    kind, _, run_url = system.partition(":")
    setting = "sample.pipeline" if kind == "diffusers" else "sample.guidance_scale"
    if any(given.partition("=")[0] == setting for given in settings):
        return {"how": "given"}
    folder = run_url if kind == "run" and best_choice(run_url) else selected
    if folder is None:
        return {"how": "recipe"}
    best = json.loads(storage.read_bytes(storage.join(folder, BEST_NAME)))
    names = ("metric", "value", "num_instances", "seed")
    return {"how": "select"} | {name: best.get(name) for name in names}
