"""The judge: reads a scene's attributes from pixels by rule, with no learned part to fool.

The time is that of the nearest sky, the place that of the nearest ground at that time, and the
object is the template (shape, size, position, shift, colour) that explains most of what the
background does not. If nothing explains enough, the answer is `None`, which counts as wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt
from PIL import Image

from d2i.demo.render import (
    COLOURS,
    GROUND_ROWS,
    OUTLINE,
    SIZE_PX,
    SKY_ROWS,
    Pose,
    background,
    object_masks,
    pose_of,
)
from d2i.demo.scene import ATTRIBUTES, Scene

Array = npt.NDArray[np.float32]
Answer = dict[str, str | None]

# A background may differ from its palette by this much (root mean square, of 255).
_BACKGROUND_TOLERANCE = 45.0
# The minimum share of a template's contrast to its background that an image must show.
_MIN_EXPLAINED = 0.1
_SHIFTS_PX = [(x, y) for x in (-2, -1, 0, 1, 2) for y in (-1, 0, 1)]
_BATCH = 64


def read_attributes(image: Image.Image) -> Answer:
    """Read the six attributes of one image, `None` for each that cannot be read.

    Args:
        image: any size and mode; read as RGB at 64x64 px.
    """
    return read_all([image])[0]


def read_all(images: Sequence[Image.Image]) -> list[Answer]:
    """Read the attributes of many images, in their order, as `read_attributes`."""
    answers: list[Answer] = []
    for start in range(0, len(images), _BATCH):
        answers += _read_batch(np.stack([_pixels(im) for im in images[start : start + _BATCH]]))
    return answers


def attribute_accuracy(answers: Sequence[Answer], scenes: Sequence[Scene]) -> dict[str, float]:
    """Return the share of images whose attribute was read correctly, by attribute.

    Args:
        answers: the attributes read from each image; `None` counts as wrong.
        scenes: the scene that each image should show, in the same order.

    Raises:
        ValueError: the lengths differ, or there is nothing to score.
    """
    if len(answers) != len(scenes) or not answers:
        raise ValueError(
            f"accuracy needs one scene per image: got {len(answers)} and {len(scenes)}, expected "
            "equal counts above 0; pass the scenes in the order of the images"
        )
    return {
        name: sum(a[name] == getattr(s, name) for a, s in zip(answers, scenes, strict=True))
        / len(scenes)
        for name in ATTRIBUTES
    }


def _pixels(image: Image.Image) -> Array:
    rgb = image.convert("RGB")
    if rgb.size != (SIZE_PX, SIZE_PX):
        rgb = rgb.resize((SIZE_PX, SIZE_PX), Image.Resampling.BOX)
    return np.asarray(rgb, dtype=np.float32)


def _read_batch(pixels_NHWC: Array) -> list[Answer]:
    backgrounds = _read_backgrounds(pixels_NHWC)
    answers: list[Answer] = []
    for pixels_HWC, (place, time) in zip(pixels_NHWC, backgrounds, strict=True):
        found: Answer = dict.fromkeys(ATTRIBUTES)
        if place is not None and time is not None:
            found |= _read_object(pixels_HWC, _background_pixels(place, time))
        answers.append(found | {"place": place, "time": time})
    return answers


def _read_backgrounds(pixels_NHWC: Array) -> list[tuple[str | None, str | None]]:
    """Return the place and the time of each image, from rows that no object reaches."""
    skies = np.stack([_background_pixels("sea", t)[:SKY_ROWS] for t in ATTRIBUTES["time"]])
    times = _nearest(pixels_NHWC[:, :SKY_ROWS], skies, ATTRIBUTES["time"])
    found: list[tuple[str | None, str | None]] = []
    for pixels_HWC, time in zip(pixels_NHWC, times, strict=True):
        grounds = np.stack([_ground_rows(place, time or "day") for place in ATTRIBUTES["place"]])
        place = _nearest(pixels_HWC[None, -GROUND_ROWS:], grounds, ATTRIBUTES["place"])[0]
        found.append((place if time else None, time))
    return found


def _nearest(regions: Array, palettes: Array, names: Sequence[str]) -> list[str | None]:
    distances = np.sqrt(
        ((regions[:, None] - palettes[None]) ** 2).mean(axis=(2, 3, 4), dtype=np.float64)
    )
    return [
        names[int(row.argmin())] if row.min() < _BACKGROUND_TOLERANCE else None for row in distances
    ]


@cache
def _background_pixels(place: str, time: str) -> Array:
    return np.asarray(background(place, time), dtype=np.float32)


def _ground_rows(place: str, time: str) -> Array:
    return _background_pixels(place, time)[-GROUND_ROWS:]


@dataclass(frozen=True)
class _Templates:
    """Every object silhouette: (shape, size, position), and masks as rows of an image's pixels."""

    names: list[tuple[str, str, str]]
    fills: Array
    rims: Array


@cache
def _templates() -> _Templates:
    names, fills, rims = [], [], []
    for shape in ATTRIBUTES["shape"]:
        for size in ATTRIBUTES["size"]:
            for position in ATTRIBUTES["position"]:
                pose = pose_of(Scene(shape, "red", size, position, "sea", "day"))
                for x, y in _SHIFTS_PX:
                    fill, outline = _coverage(
                        shape, Pose(pose.centre + x, pose.base + y, pose.extent)
                    )
                    names.append((shape, size, position))
                    fills.append(fill)
                    rims.append(outline - fill)
    return _Templates(names, np.stack(fills), np.stack(rims))


def _coverage(shape: str, pose: Pose) -> tuple[Array, Array]:
    fill, outline = (
        np.asarray(mask, dtype=np.float32).ravel() / np.float32(255)
        for mask in object_masks(shape, pose)
    )
    return fill, np.maximum(fill, outline)


def _read_object(pixels_HWC: Array, background_HWC: Array) -> Answer:
    """Return the object whose template removes most squared error, if it removes enough of it."""
    templates = _templates()
    colours = np.array([*COLOURS.values(), OUTLINE], dtype=np.float32)
    pixels, back = pixels_HWC.reshape(-1, 1, 3), background_HWC.reshape(-1, 1, 3)
    gains = ((pixels - back) ** 2 - (pixels - colours) ** 2).sum(axis=2)
    scores = templates.fills @ gains[:, :-1] + templates.rims @ gains[:, -1:]
    template, colour = np.unravel_index(int(scores.argmax()), scores.shape)
    contrast = ((back - colours) ** 2).sum(axis=2)
    expected = templates.fills[template] @ contrast[:, colour]
    expected += templates.rims[template] @ contrast[:, -1]
    if scores[template, colour] < _MIN_EXPLAINED * expected:
        return {}
    shape, size, position = templates.names[template]
    return {
        "shape": shape,
        "colour": list(COLOURS)[colour],
        "size": size,
        "position": position,
    }
