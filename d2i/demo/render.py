"""Renderer of the made world's scenes: 64x64 px, flat colours, anti-aliased, Pillow only.

Holds the geometry and the palette, which the judge uses too; imports only `scene` from d2i.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from functools import cache

from PIL import Image, ImageDraw

from d2i.demo.scene import Scene

SIZE_PX = 64
HORIZON_PX = 42
# Rows at the top and the bottom that no object reaches, even with jitter: background only.
SKY_ROWS = 15
GROUND_ROWS = 3

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 35, 40),
    "yellow": (250, 215, 35),
    "green": (30, 172, 70),
    "blue": (40, 75, 230),
    "pink": (245, 105, 205),
    "white": (252, 252, 250),
}
OUTLINE = (35, 30, 45)

_OVERSAMPLE = 4
_BASE_PX = 57
_EXTENT_PX = {"small": 26, "large": 38}
_CENTRE_PX = {"left": 20, "middle": 32, "right": 44}
_SKY = {
    "day": ((105, 180, 245), (200, 230, 250)),
    "evening": ((150, 85, 150), (255, 180, 110)),
    "night": ((12, 16, 48), (45, 55, 105)),
}
_TINT = {"day": (1.0, 1.0, 1.0), "evening": (0.88, 0.70, 0.66), "night": (0.42, 0.44, 0.56)}
_GROUND = {
    "meadow": (120, 165, 80),
    "beach": (226, 198, 140),
    "sea": (45, 115, 165),
    "snow": (234, 240, 248),
}


@dataclass(frozen=True)
class Pose:
    """Position and size of the object: horizontal centre, lower edge and extent, in pixels."""

    centre: float
    base: float
    extent: float


def pose_of(scene: Scene) -> Pose:
    """Return the pose of a scene without jitter."""
    return Pose(_CENTRE_PX[scene.position], _BASE_PX, _EXTENT_PX[scene.size])


def render_scene(scene: Scene, jitter_seed: int | None) -> Image.Image:
    """Render a scene.

    Args:
        scene: the scene to render.
        jitter_seed: seed of small changes of the object's pose and of the light; `None` for none.

    Returns:
        An RGB image of 64x64 px, the same bytes for the same arguments.
    """
    pose, light = pose_of(scene), 0.0
    if jitter_seed is not None:
        rng = random.Random(f"{jitter_seed} {scene}")
        pose = Pose(
            pose.centre + rng.uniform(-2, 2),
            pose.base + rng.uniform(-1, 1),
            pose.extent * rng.uniform(0.96, 1.04),
        )
        light = rng.uniform(-5, 5)
    image = background(scene.place, scene.time).copy()
    fill, outline = object_masks(scene.shape, pose)
    image.paste(OUTLINE, mask=outline)
    image.paste(COLOURS[scene.colour], mask=fill)
    return image.point(lambda value: value + light) if light else image


def object_masks(shape: str, pose: Pose) -> tuple[Image.Image, Image.Image]:
    """Return object coverage as two "L" images of 64x64 px: its fill, and fill plus outline."""
    side = SIZE_PX * _OVERSAMPLE
    fill, outline = Image.new("L", (side, side)), Image.new("L", (side, side))
    _paint(ImageDraw.Draw(outline), shape, pose, 0.0)
    _paint(ImageDraw.Draw(fill), shape, pose, 1.6)
    return _shrink(fill), _shrink(outline)


@cache
def background(place: str, time: str) -> Image.Image:
    """Return the image of a place at a time of day, without an object; cached, do not modify it."""
    side = SIZE_PX * _OVERSAMPLE
    image = Image.new("RGB", (side, side))
    canvas = ImageDraw.Draw(image)
    _paint_sky(canvas, time)
    _paint_place(canvas, place, _TINT[time])
    return _shrink(image)


def _shrink(image: Image.Image) -> Image.Image:
    return image.resize((SIZE_PX, SIZE_PX), Image.Resampling.BOX)


def _scaled(*values: float) -> list[float]:
    return [value * _OVERSAMPLE for value in values]


def _paint(canvas: ImageDraw.ImageDraw, shape: str, pose: Pose, inset: float) -> None:
    half = pose.extent / 2
    middle = pose.base - half
    if shape in ("ball", "ring"):
        _paint_disk(canvas, pose.centre, middle, half - inset, 255)
        if shape == "ring":
            _paint_disk(canvas, pose.centre, middle, half * 0.48 + inset, 0)
        return
    points = [(pose.centre + half * x, middle + half * y) for x, y in _corners(shape, inset / half)]
    canvas.polygon([coordinate * _OVERSAMPLE for point in points for coordinate in point], fill=255)


def _paint_disk(canvas: ImageDraw.ImageDraw, x: float, y: float, radius: float, value: int) -> None:
    canvas.ellipse(_scaled(x - radius, y - radius, x + radius, y + radius), fill=value)


def _corners(shape: str, inset: float) -> list[tuple[float, float]]:
    """Return the corners relative to the centre, in half extents, inset by an even border."""
    if shape == "box":
        edge = 0.92 - inset
        return [(-edge, -edge), (edge, -edge), (edge, edge), (-edge, edge)]
    if shape == "tent":
        # An inset of b moves a triangle's corners by more than b, sharper corners further.
        return [(0, -1 + 2.2 * inset), (1 - 1.6 * inset, 1 - inset), (-1 + 1.6 * inset, 1 - inset)]
    turns = [math.pi * (step / 5 - 0.5) for step in range(10)]
    radii = [1.08 - 2.4 * inset if step % 2 == 0 else 0.52 - inset for step in range(10)]
    return [(r * math.cos(turn), r * math.sin(turn)) for r, turn in zip(radii, turns, strict=True)]


def _paint_sky(canvas: ImageDraw.ImageDraw, time: str) -> None:
    top, bottom = _SKY[time]
    height = HORIZON_PX * _OVERSAMPLE
    for row in range(height):
        share = row / (height - 1)
        colour = tuple(round(a + (b - a) * share) for a, b in zip(top, bottom, strict=True))
        canvas.line((0, row, SIZE_PX * _OVERSAMPLE, row), fill=colour)
    if time == "day":
        _disk(canvas, 54, 8, 4.5, (255, 240, 150))
    elif time == "evening":
        _disk(canvas, 10, 9, 5, (255, 205, 120))
    else:
        _disk(canvas, 32, 8, 4.5, (240, 240, 215))
        for x, y in ((8, 6), (18, 11), (48, 10), (58, 5)):
            _disk(canvas, x, y, 0.9, (235, 235, 255))


def _paint_place(canvas: ImageDraw.ImageDraw, place: str, tint: tuple[float, float, float]) -> None:
    ground = _tinted(_GROUND[place], tint)
    if place == "meadow":
        for x, radius in ((8, 22), (50, 26)):
            _disk(canvas, x, HORIZON_PX + radius - 8, radius, _tinted((90, 140, 75), tint))
    elif place == "snow":
        for x, height in ((12, 15), (34, 10), (54, 17)):
            corners = _scaled(x - 14, HORIZON_PX, x, HORIZON_PX - height, x + 14, HORIZON_PX)
            canvas.polygon(corners, fill=_tinted((165, 180, 205), tint))
    elif place == "beach":
        canvas.rectangle(_scaled(0, HORIZON_PX - 4, 64, 64), fill=_tinted((70, 150, 185), tint))
    canvas.rectangle(_scaled(0, HORIZON_PX, 64, 64), fill=ground)
    if place == "sea":
        for row in (45, 50, 55, 60):
            canvas.rectangle(_scaled(0, row, 64, row + 1), fill=_tinted((110, 170, 205), tint))


def _disk(
    canvas: ImageDraw.ImageDraw, x: float, y: float, radius: float, fill: tuple[int, ...]
) -> None:
    canvas.ellipse(_scaled(x - radius, y - radius, x + radius, y + radius), fill=fill)


def _tinted(colour: tuple[int, int, int], tint: tuple[float, float, float]) -> tuple[int, int, int]:
    red, green, blue = (round(c * t) for c, t in zip(colour, tint, strict=True))
    return red, green, blue
