"""Training texts of CLIP and the backbone, as token windows, and their compact vocabulary.

Row i of the embedding stands for the true CLIP id `clip_ids[i]`, and row 0 for every id that the
made world never uses.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from d2i.demo.dialogs import caption, contexts, make_dialog
from d2i.demo.scene import ATTRIBUTES, Scene
from d2i.dialog import Turn, linearize
from d2i.tokenize import encode, window

_NUM_CLIP_IDS = 49408
_SECOND_SCENE_SHARE = 0.25


@dataclass(frozen=True)
class Texts:
    """Windows of true CLIP ids, int64 (N, 77), and the scene that each one describes."""

    windows_NT: torch.Tensor
    scenes: list[Scene]


def caption_windows(scenes: Sequence[Scene], seed: int) -> Texts:
    """Return one caption for each listed scene."""
    rng = random.Random(f"{seed} captions")
    return _texts([(caption(scene, rng), scene) for scene in scenes])


def dialog_windows(scenes: Sequence[Scene], seed: int) -> Texts:
    """Return one dialog about each listed scene; one with a second scene gives two contexts."""
    rng = random.Random(f"{seed} dialogs")
    found = []
    for scene in scenes:
        second = rng.choice(scenes) if rng.random() < _SECOND_SCENE_SHARE else None
        for context, shown in contexts(make_dialog(scene, rng, second)):
            found.append((linearize([Turn(None, text) for text in context]), shown))
    return _texts(found)


def join(*parts: Texts) -> Texts:
    """Return all texts of several collections, in order."""
    return Texts(
        torch.cat([part.windows_NT for part in parts]),
        [scene for part in parts for scene in part.scenes],
    )


def vocabulary(texts: Texts) -> list[int]:
    """Return `clip_ids`: 0 for the row of any other id, then every id that occurs, ascending."""
    return [0, *(i for i in torch.unique(texts.windows_NT).tolist() if i)]


def to_rows(windows_NT: torch.Tensor, clip_ids: Sequence[int]) -> torch.Tensor:
    """Convert true CLIP ids to rows of the compact vocabulary."""
    rows = torch.zeros(_NUM_CLIP_IDS, dtype=torch.int64)
    rows[torch.tensor(clip_ids[1:])] = torch.arange(1, len(clip_ids))
    return rows[windows_NT]


def labels(scenes: Sequence[Scene]) -> torch.Tensor:
    """Return attribute values as indices, int64 (N, 6), in the order of `ATTRIBUTES`."""
    return torch.tensor(
        [[values.index(getattr(s, name)) for name, values in ATTRIBUTES.items()] for s in scenes]
    )


def _texts(found: Sequence[tuple[str, Scene]]) -> Texts:
    windows = np.stack([window(encode(text)) for text, _ in found]).astype(np.int64)
    return Texts(torch.from_numpy(windows), [scene for _, scene in found])
