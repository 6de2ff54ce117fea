"""Training images of all parts: scenes open to training, rendered and held in memory.

Knows no network.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from d2i.demo.render import render_scene
from d2i.demo.scene import Scene, split_scenes


@dataclass(frozen=True)
class ImageBatch:
    """Scenes with their renderings: `pixels_NCHW` is uint8 (N, 3, 64, 64), in the scenes' order."""

    scenes: list[Scene]
    pixels_NCHW: torch.Tensor

    def batch(self, indices: torch.Tensor) -> torch.Tensor:
        """Return the images at `indices` as float32 in -1..1."""
        return self.pixels_NCHW[indices].float().div_(127.5).sub_(1)


def render(num_jitters: int, first_jitter: int = 0) -> ImageBatch:
    """Render every scene that is open to training `num_jitters` times."""
    open_scenes, _ = split_scenes()
    return render_scenes(open_scenes * num_jitters, first_jitter)


def render_scenes(scenes: list[Scene], first_jitter: int = 0) -> ImageBatch:
    """Render each listed scene once, image i with jitter `first_jitter + i`."""
    pixels = np.stack([np.asarray(render_scene(s, first_jitter + i)) for i, s in enumerate(scenes)])
    return ImageBatch(scenes, torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous())
