"""The shipped network draws what a caption says, also of scenes that it never saw."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from d2i.demo.judge import read_all, share_right
from d2i.demo.pretrain.measure import generate
from d2i.demo.pretrain.texts import caption_windows
from d2i.demo.scene import split_scenes
from d2i.encoders import Vae
from d2i.weights_resolve import resolve_weights


@pytest.mark.slow
def test_captions_of_held_out_scenes_are_drawn_right() -> None:
    models = Path(resolve_weights("demo:vae")).parent
    texts = caption_windows(split_scenes()[1][::4], seed=5)
    drawn = generate(models, Vae(str(models / "vae"), "kl"), texts)
    shares = share_right(read_all([Image.fromarray(p) for p in drawn]), texts.scenes)
    assert sum(shares.values()) / len(shares) >= 0.85


def test_the_shipped_models_stay_small() -> None:
    models = Path(resolve_weights("demo:vae")).parent
    assert sum(file.stat().st_size for file in models.rglob("*") if file.is_file()) < 12e6
