"""Fixtures of the integration tests."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.integration import evaluations, training
from tests.integration.commands import preprocess
from tests.integration.logged import LOG
from tests.integration.networks import save_random_clip
from tests.processes import run_d2i
from tests.shared import SHARED


@pytest.fixture(scope="session")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Settings of the demo recipe with a real autoencoder and a tiny U-ViT on its 8x8 latents."""
    directory = tmp_path_factory.mktemp("clip")
    save_random_clip(directory)
    values = {
        "encoders.vae": SHARED / "weights" / "taesd_fp8.safetensors",
        "encoders.vae_kind": "tiny",
        "encoders.clip_image": directory / "clip_image",
        "encoders.clip_text": directory / "clip_text",
        "metrics.clip_text": directory / "clip_text",
        "encoders.compute_batch_size": 8,
        "backbone.weights": "scratch",
        "backbone.latent_scale": 1.0,
        "backbone.latent_size": 8,
        "backbone.patch_size": 2,
        "backbone.dim": 32,
        "backbone.depth": 3,
        "backbone.num_heads": 2,
        "backbone.text_dim": 32,
        "train.num_steps": 3,
        "train.global_batch_size": 4,
        "train.num_checkpoint_steps": 2,
        "sample.num_steps": 3,
        "sample.compute_batch_size": 8,
    }
    return [part for name, value in values.items() for part in ("--set", f"{name}={value}")]


@pytest.fixture(scope="session")
def chat_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Chats prepared for the demo's network: 23 test and 12 training dialogs."""
    directory = tmp_path_factory.mktemp("chats")
    descriptions = []
    for split, count in (("test", 23), ("train", 12)):
        names = [f"{split}{number}" for number in range(count)]
        lines = [write_chat(directory, name) for name in names]
        (directory / f"{split}.jsonl").write_text("\n".join(lines))
        descriptions += [
            {"image": f"{name}.png", "description": f"a {name[-1]} ball", "made_by": "the tests"}
            for name in names
        ]
    path = directory / "descriptions.jsonl"
    path.write_text("\n".join(map(json.dumps, descriptions)))
    preprocess("jsonl", directory, directory / "data", "--set", f"corpus.descriptions={path}")
    return directory / "data"


@pytest.fixture(scope="session")
def whole(chat_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted evaluation of the chats in one process."""
    directory = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(LOG, str(directory / "drawn.txt"))
        run_d2i(*evaluations.command(chat_data, directory / "out"))
    return directory / "out"


@pytest.fixture(scope="session")
def training_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of random numbers for a tiny network."""
    return training.write_data(tmp_path_factory.mktemp("training"))


@pytest.fixture(scope="session")
def trained(training_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted training on two ranks."""
    run = tmp_path_factory.mktemp("runs") / "undisturbed"
    assert training.train(training_data, run, train__record_keys="true")["finished"]
    return run


WORDS = ("red", "yellow", "green", "blue", "pink", "white", "ball", "box", "tent", "ring", "star")


def write_chat(directory: Path, name: str) -> str:
    """Write a noise image of a distinct colour; return the chat that shares it."""
    rng = random.Random(name)
    colour = np.array([rng.randrange(256) for _ in range(3)])
    noise = np.random.default_rng(rng.randrange(1000)).normal(0, 25, (64, 80, 3))
    pixels = (colour + noise).clip(0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(directory / f"{name}.png")
    text = " ".join(rng.choices(WORDS, k=6))
    turns = [{"text": text}, {"text": "here", "images": [f"{name}.png"]}]
    return json.dumps({"id": name, "turns": turns})
