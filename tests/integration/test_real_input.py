"""Every stage on real photographs, the real tiny autoencoder and the true CLIP vocabulary."""

from __future__ import annotations

import functools
import json
import shutil
import signal
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.integration.networks import save_random_clip
from tests.processes import run_d2i, run_process
from tests.shared import SHARED, needs_shared

pytestmark = needs_shared
SPLITS = ("train", "valid", "test")


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The demo's recipe with a real autoencoder and a tiny U-ViT on its 8x8 latents."""
    folder = tmp_path_factory.mktemp("clip")
    save_random_clip(folder)
    values = {
        "encoders.vae": SHARED / "weights" / "taesd_fp8.safetensors",
        "encoders.vae_kind": "tiny",
        "encoders.clip_image": folder / "clip_image",
        "encoders.clip_text": folder / "clip_text",
        "encoders.compute_batch_size": 8,
        "backbone.weights": "null",
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


def preprocess(corpus: str, source: Path, out: Path, *extra: str) -> dict[str, dict[str, Any]]:
    result = run_d2i(
        *("preprocess", "--corpus", corpus, "--source", source, "--out", out),
        *("--recipe", "demo", "--workers", "0", "--json", *extra),
    )
    return {split["split"]: split for split in result["splits"]}


def test_mmdialog_from_conversations_to_scores(tmp_path: Path, settings: list[str]) -> None:
    source = SHARED / "data" / "mmdialog"
    expected = json.loads((source / "EXPECTED.json").read_text())
    data, run, scores = tmp_path / "data", tmp_path / "run", tmp_path / "scores"

    splits = preprocess("mmdialog", source, data, *settings)
    for name in SPLITS:
        counts = expected[name]
        assert splits[name]["num_instances"] == counts["image_occurrences"]
        assert splits[name]["num_images"] == counts["unique_images"]
        assert splits[name]["num_written"] == counts["usable_instances"]
        lost = counts["missing_files"] + counts["truncated_files"]
        assert sum(splits[name]["failures"].values()) == lost
    assert splits["train"]["failures"] == {"decode_error": 1, "missing_file": 1}

    before = {path: path.read_bytes() for path in data.rglob("*.tar")}
    again = preprocess("mmdialog", source, data, *settings)
    assert again == splits
    assert {path: path.read_bytes() for path in data.rglob("*.tar")} == before
    assert run_d2i("verify", data, "--json")["problems"] == []

    run_d2i(
        *("train", "--recipe", "demo", "--data", data, "--run", run),
        *("--num-accelerators", "2", *settings),
    )
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert losses
    assert np.isfinite(losses).all()

    result = run_d2i(
        *("eval", "--system", f"run:{run}", "--data", data, "--out", scores),
        *("--save-images", "all", "--json"),
    )
    assert result["card"]["found"] == result["card"]["expected"] == 5
    assert np.isfinite([result["scores"][name] for name in ("fid", "kid", "clip_i")]).all()

    chat = tmp_path / "chat.txt"
    chat.write_text("what did you wear?\na red hat\n")
    pictures = [tmp_path / "one.png", tmp_path / "two.png"]
    for picture in pictures:
        run_d2i("sample", "--run", run, "--dialog", chat, "--seed", "3", "--out", picture)
    assert pictures[0].read_bytes() == pictures[1].read_bytes()
    drawn = Image.open(pictures[0])
    assert drawn.size == (64, 64)
    assert drawn.info["text"] == "# what did you wear? # a red hat"
    assert drawn.info["seed"] == "3"


@pytest.mark.parametrize("point", ["shard.index", "manifest.checksum"])
def test_preprocessing_killed_at_a_point_ends_the_same(
    tmp_path: Path, settings: list[str], point: str
) -> None:
    source, out = SHARED / "data" / "mmdialog", tmp_path / "data"
    killed = run_process(
        *("preprocess", "--corpus", "mmdialog", "--source", source, "--out", out),
        *("--recipe", "demo", "--workers", "0", "--split", "test", *settings),
        *("--fault", f"{point}:kill:1"),
    )
    assert killed.returncode == -signal.SIGKILL
    assert not (out / "test" / "manifest.json").exists()
    again = preprocess("mmdialog", source, out, "--split", "test", *settings)
    assert again["test"]["num_written"] == 5
    assert run_d2i("verify", out, "--json")["problems"] == []


class Photographs(SimpleHTTPRequestHandler):
    """Answers every address with one photograph, except those asked to fail."""

    def do_GET(self) -> None:
        if "gone" in self.path:
            self.send_error(404)
            return
        self.path = "/photo.jpg"
        super().do_GET()

    def log_message(self, *_: object) -> None:
        """Stay quiet."""


@pytest.fixture
def photo_server(tmp_path: Path) -> Iterator[str]:
    photo = sorted((SHARED / "data" / "photos" / "dress").glob("*.jpg"))[0]
    folder = tmp_path / "served"
    folder.mkdir()
    shutil.copy(photo, folder / "photo.jpg")
    handler = functools.partial(Photographs, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def with_addresses_at(host: str, source: Path) -> Path:
    """The excerpt with its Flickr addresses on `host`; dialog 7's photograph is gone there."""
    for path in source.rglob("*.json"):
        dialogs = json.loads(path.read_text())
        for dialog in dialogs:
            name = "gone" if dialog["dialogue_id"] == 7 else "flickr"
            dialog["photo_url"] = f"http://{host}/{name}/{dialog['dialogue_id']}.jpg"
        path.write_text(json.dumps(dialogs))
    return source


def test_photochat_by_address(tmp_path: Path, settings: list[str], photo_server: str) -> None:
    source = tmp_path / "photochat"
    shutil.copytree(SHARED / "data" / "photochat", source)
    with_addresses_at(photo_server, source)
    mirror = f"corpus.open_images_url=http://{photo_server}/gone/{{photo_id}}.jpg"
    extra = [*settings, "--set", mirror]

    asked = preprocess("photochat", source, tmp_path / "a", "--allow-host", photo_server, *extra)
    assert asked["train"]["num_written"] == 2
    assert asked["test"]["num_written"] == 2
    assert asked["test"]["failures"] == {"http_404": 1}

    refused = preprocess("photochat", source, tmp_path / "b", *extra)
    assert refused["test"]["num_written"] == 0
    assert refused["test"]["failures"] == {"refused_address": 3}
