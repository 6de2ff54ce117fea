"""The shipped demo network generates what a caption says, also for held-out scenes."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from benchmarks.demo_weights.measure import generate
from benchmarks.demo_weights.texts import caption_windows
from d2i.demo.judge import attribute_accuracy, read_all
from d2i.demo.scene import split_scenes
from d2i.encoders import Vae
from d2i.weights_resolve import resolve_weights


@pytest.mark.slow
def test_demo_network_generates_held_out_captions_correctly() -> None:
    models = Path(resolve_weights("demo:vae")).parent
    texts = caption_windows(split_scenes()[1][::4], seed=5)
    images = generate(models, Vae(str(models / "vae"), "kl"), texts)
    shares = attribute_accuracy(read_all([Image.fromarray(p) for p in images]), texts.scenes)
    assert sum(shares.values()) / len(shares) >= 0.85


def test_shipped_demo_weights_are_under_12_mb() -> None:
    models = Path(resolve_weights("demo:vae")).parent
    assert sum(file.stat().st_size for file in models.rglob("*") if file.is_file()) < 12e6
