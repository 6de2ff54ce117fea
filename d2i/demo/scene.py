"""The demo's made world in words: six attributes, their combinations, and which are held out.

Owns the attribute names and the held-out rule; imports nothing of d2i.
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
        """The scene as a plain dict, in the order of `ATTRIBUTES`."""
        return asdict(self)


def all_scenes() -> list[Scene]:
    """Every combination, 2,160 of them, in a fixed order."""
    return [Scene(*values) for values in itertools.product(*ATTRIBUTES.values())]


def is_held_out(scene: Scene) -> bool:
    """Whether this combination is shown by the test split, and by nothing else, ever.

    Dialogs that correct themselves may name one on their way to another scene. A hash of the
    attributes decides, about one in ten: new dialogs about scenes that were trained on would not
    show that a network composes.
    """
    digest = hashlib.sha256("|".join(astuple(scene)).encode()).digest()
    return int.from_bytes(digest[:8], "big") % _HELD_OUT_EVERY == 0


def split_scenes() -> tuple[list[Scene], list[Scene]]:
    """All scenes as (open to training, held out)."""
    scenes = all_scenes()
    open_scenes = [scene for scene in scenes if not is_held_out(scene)]
    return open_scenes, [scene for scene in scenes if is_held_out(scene)]
