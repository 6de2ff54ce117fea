"""The judge reads reference images correctly, and answers None if there is nothing to read."""

import io
import random

import numpy as np
import pytest
from PIL import Image, ImageFilter

from d2i.demo.judge import attribute_accuracy, read_all, read_attributes
from d2i.demo.render import background, render_scene
from d2i.demo.scene import ATTRIBUTES, Scene, all_scenes


def as_jpeg(image: Image.Image) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95)
    return Image.open(buffer)


def some_scenes(count: int) -> list[Scene]:
    return random.Random(11).sample(all_scenes(), count)


def test_judge_reads_reference_images_correctly() -> None:
    scenes = some_scenes(300)
    shares = attribute_accuracy(
        read_all([as_jpeg(render_scene(s, i)) for i, s in enumerate(scenes)]), scenes
    )
    assert min(shares.values()) >= 0.98


def test_judge_scores_images_of_other_scenes_at_chance() -> None:
    scenes = some_scenes(300)
    answers = read_all([render_scene(s, i) for i, s in enumerate(scenes)])
    shares = attribute_accuracy(answers, [*scenes[150:], *scenes[:150]])
    for name, values in ATTRIBUTES.items():
        assert shares[name] == pytest.approx(1 / len(values), abs=0.1)


def test_judge_reads_upscaled_and_blurred_images() -> None:
    scenes = some_scenes(60)
    blurred = [
        render_scene(s, i).filter(ImageFilter.GaussianBlur(0.7)) for i, s in enumerate(scenes)
    ]
    shares = attribute_accuracy(read_all([p.resize((256, 256)) for p in blurred]), scenes)
    assert sum(shares.values()) / len(shares) >= 0.95


def test_judge_reads_nothing_in_noise() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (20, 64, 64, 3), dtype=np.uint8)
    answers = read_all([Image.fromarray(pixels) for pixels in noise])
    assert all(value is None for answer in answers for value in answer.values())


@pytest.mark.parametrize("place", ATTRIBUTES["place"])
@pytest.mark.parametrize("time", ATTRIBUTES["time"])
def test_judge_finds_no_object_on_bare_background(place: str, time: str) -> None:
    answer = read_attributes(background(place, time))
    assert (answer["place"], answer["time"]) == (place, time)
    assert [answer[name] for name in ("shape", "colour", "size", "position")] == [None] * 4


def test_share_right_rejects_length_mismatch() -> None:
    with pytest.raises(ValueError, match="one scene per image"):
        attribute_accuracy(read_all([render_scene(all_scenes()[0], 0)]), [])
