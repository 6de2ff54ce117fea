"""Scenes of the demo's made world: six attributes, their combinations, and the held-out rule.

Holds the attribute names; imports nothing from d2i.
"""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import asdict, astuple, dataclass

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "shape": ("ball", "box", "tent", "ring", "star"),
    "colour": ("red", "yellow", "green", "blue", "pink", "white"),
    "size": ("small", "large"),
    "position": ("left", "middle", "right"),
    "place": ("meadow", "beach", "sea", "snow"),
    "time": ("day", "evening", "night"),
}

GROUPS: dict[str, tuple[str, ...]] = {
    "object": ("shape", "colour", "size", "position"),
    "background": ("place", "time"),
}

_HELD_OUT_EVERY = 10


@dataclass(frozen=True)
class Scene:
    """One combination of attributes; each field is a value of `ATTRIBUTES` of that name."""

    shape: str
    colour: str
    size: str
    position: str
    place: str
    time: str

    def attributes(self) -> dict[str, str]:
        """Return the scene as a plain dict, in the order of `ATTRIBUTES`."""
        return asdict(self)


def all_scenes() -> list[Scene]:
    """Return all 2,160 combinations, in a fixed order."""
    return [Scene(*values) for values in itertools.product(*ATTRIBUTES.values())]


def is_held_out(scene: Scene) -> bool:
    """Return whether only images of the test split show this combination.

    A dialog of any split may still name one before it corrects itself. A hash of the attributes
    holds out about one scene in ten: new dialogs about trained scenes would not show that a network
    can compose attributes.
    """
    digest = hashlib.sha256("|".join(astuple(scene)).encode()).digest()
    return int.from_bytes(digest[:8], "big") % _HELD_OUT_EVERY == 0


def split_scenes() -> tuple[list[Scene], list[Scene]]:
    """Return all scenes as (open to training, held out)."""
    scenes = all_scenes()
    open_scenes = [scene for scene in scenes if not is_held_out(scene)]
    return open_scenes, [scene for scene in scenes if is_held_out(scene)]
