"""Who chose the guidance scale of an evaluation: one that was searched for scores better.

Must not import torch.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from d2i import storage
from d2i.runs import BEST_NAME, best_choice

_SETTING = "sample.guidance_scale"


def chosen_by(system: str, settings: Sequence[str]) -> dict[str, Any]:
    """Say how a system's guidance scale comes about.

    Args:
        system: As `--system` takes it.
        settings: Those of the command, which outweigh what `d2i select` chose.

    Returns:
        `how`: `given` (a setting of the command), `select` (`d2i select`, with `metric`, `value`,
        `num_instances` and `seed` of its choice) or `recipe`.

    Raises:
        ConfigError: If what `d2i select` wrote is damaged.
    """
    if any(setting.partition("=")[0] == _SETTING for setting in settings):
        return {"how": "given"}
    kind, _, run_url = system.partition(":")
    if kind != "run" or not best_choice(run_url):
        return {"how": "recipe"}
    best = json.loads(storage.read_bytes(storage.join(run_url, BEST_NAME)))
    names = ("metric", "value", "num_instances", "seed")
    return {"how": "select"} | {name: best.get(name) for name in names}
