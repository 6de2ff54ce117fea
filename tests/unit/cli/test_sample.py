"""`d2i sample` generates one image in a small batch, the same alone or in a grid."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from d2i.cli.sample import sample
from d2i.recipes import load_recipe
from tests.runs import write_demo_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_demo_run(tmp_path / "run")


def generate_image(run: Path, *seeds: int, **options: str) -> Image.Image:
    dialog = run / "dialog.txt"
    dialog.write_text("a red ball on the beach")
    steps, out = ["sample.num_steps=2"], run / "picture.png"
    sample(str(run), str(dialog), out=str(out), seed=list(seeds), settings=steps, **options)
    with Image.open(out) as image:
        return image.copy()


def test_sample_of_one_seed_equals_its_image_in_grid(run: Path) -> None:
    alone, grid = generate_image(run, 1), generate_image(run, 5, 4, 3, 2, 1)
    assert alone.info["compute_batch_size"] == "4"
    assert (alone.size, grid.size) == ((64, 64), (192, 128))
    np.testing.assert_array_equal(np.asarray(alone), np.asarray(grid)[64:, 64:128])


def test_sample_of_instance_key_uses_evaluation_batch_size(run: Path) -> None:
    own = str(load_recipe("demo").sample.compute_batch_size)
    assert generate_image(run, 1, key="test-1").info["compute_batch_size"] == own
