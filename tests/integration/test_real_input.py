"""Every stage on real photographs, the real tiny autoencoder and the real CLIP vocabulary."""

from __future__ import annotations

import hashlib
import json
import shutil
import tarfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from d2i.shards import ShardReader
from tests.integration.commands import preprocess
from tests.processes import run_d2i, run_process
from tests.shared import SHARED, needs_shared

pytestmark = needs_shared
SPLITS = ("train", "valid", "test")


def test_mmdialog_end_to_end_from_conversations_to_scores(
    tmp_path: Path, settings: list[str]
) -> None:
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

    check_training_and_scores(data, run, scores, num_test=5, settings=settings)

    chat = tmp_path / "chat.txt"
    chat.write_text("what did you wear?\na red hat\n")
    images = [tmp_path / "one.png", tmp_path / "two.png"]
    for image in images:
        run_d2i("sample", "--run", run, "--dialog", chat, "--seed", "3", "--out", image)
    assert images[0].read_bytes() == images[1].read_bytes()
    generated = Image.open(images[0])
    assert generated.size == (64, 64)
    assert generated.info["text"] == "# what did you wear? # a red hat"
    assert generated.info["seed"] == "3"
    check_sample_command_matches_evaluation(data, run, scores, tmp_path)


def check_sample_command_matches_evaluation(
    data: Path, run: Path, scores: Path, directory: Path
) -> None:
    """`d2i sample` with an instance's key and dialog gives the evaluated image, also in a grid."""
    reader = ShardReader(str(data / "test"))
    sample = reader.read_json(0)
    chat, grid = directory / "chat.json", directory / "grid.png"
    chat.write_text(json.dumps(sample["context"]))
    run_d2i(
        *("sample", "--run", run, "--dialog", chat, "--key", reader.keys[0], "--out", grid),
        *("--seed", "0", "--seed", "1", "--set", "sample.compute_batch_size=2"),
    )
    images = {}
    for path in sorted((scores / "images").iterdir()):
        with tarfile.open(path) as tar:
            images |= {m.name: Image.open(tar.extractfile(m)).copy() for m in tar}
    expected = np.asarray(images[f"{reader.keys[0]}.png"], dtype=int)
    both = np.asarray(Image.open(grid), dtype=int)
    assert both.shape == (64, 128, 3)
    # Workers compute with one thread, the command with all, so last bits may differ.
    assert np.abs(both[:, :64] - expected).max() <= 2
    assert np.abs(both[:, 64:] - expected).max() > 2


PHOTOGRAPHS = sorted((SHARED / "data" / "photos").rglob("*.jpg"))


class Photographs(BaseHTTPRequestHandler):
    """Answers `/flickr/N.jpg` with photograph N, and every other URL with 404."""

    def do_GET(self) -> None:
        name = self.path.removeprefix("/flickr/").removesuffix(".jpg")
        if not name.isdigit():
            self.send_error(404)
            return
        data = photograph(int(name)).read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Stay quiet."""


def photograph(dialog_id: int) -> Path:
    return PHOTOGRAPHS[dialog_id * 7 % len(PHOTOGRAPHS)]


@pytest.fixture
def photo_server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Photographs) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def move_photo_urls_to(host: str, source: Path) -> Path:
    """Rewrite the excerpt's Flickr URLs to `host`, where dialog 7's photograph is missing."""
    for path in source.rglob("*.json"):
        dialogs = json.loads(path.read_text())
        for dialog in dialogs:
            name = "gone" if dialog["dialogue_id"] == 7 else "flickr"
            dialog["photo_url"] = f"http://{host}/{name}/{dialog['dialogue_id']}.jpg"
        path.write_text(json.dumps(dialogs))
    return source


# Training and scoring read shards, whatever their corpus: `make test` does both with MMDialog's.
@pytest.mark.parametrize("last", ["shards", pytest.param("scores", marks=pytest.mark.soak)])
def test_photochat_end_to_end_from_urls(
    tmp_path: Path, settings: list[str], photo_server: str, last: str
) -> None:
    source = tmp_path / "photochat"
    shutil.copytree(SHARED / "data" / "photochat", source)
    move_photo_urls_to(photo_server, source)
    mirror = f"corpus.open_images_url=http://{photo_server}/gone/{{photo_id}}.jpg"
    extra = [*settings, "--set", mirror]
    data = tmp_path / "data"

    refused = run_process(
        *("preprocess", "--corpus", "photochat", "--source", source, "--split", "test"),
        *("--out", tmp_path / "refused", "--recipe", "demo", "--workers", "0", "--json", *extra),
    )
    assert refused.returncode == 1, refused.stderr
    (split,) = json.loads(refused.stdout)["splits"]
    assert (split["num_written"], split["failures"]) == (0, {"refused_address": 3})

    asked = preprocess("photochat", source, data, "--allow-host", photo_server, *extra)
    assert asked["train"]["num_written"] == 2
    assert asked["test"]["num_written"] == 2
    assert asked["test"]["failures"] == {"http_404": 1}
    reader = ShardReader(str(data / "test"))
    for sample in map(reader.read_json, range(len(reader))):
        sent = photograph(int(sample["dialog_id"])).read_bytes()
        assert sample["source"]["sha256"] == hashlib.sha256(sent).hexdigest()

    if last == "scores":
        run, scores = tmp_path / "run", tmp_path / "scores"
        check_training_and_scores(data, run, scores, num_test=2, settings=settings)


def check_training_and_scores(
    data: Path, run: Path, scores: Path, *, num_test: int, settings: list[str]
) -> None:
    """Train on two ranks; generate and score the test split on two Ray workers."""
    run_d2i(
        *("train", "--recipe", "demo", "--data", data, "--run", run),
        *("--num-accelerators", "2", *settings),
    )
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert losses
    assert np.isfinite(losses).all()
    result = run_d2i(
        *("eval", "--system", f"run:{run}", "--data", data, "--out", scores),
        *("--set", "sample.compute_batch_size=2", "--parallel", "--workers", "2", "--json"),
        *("--save-images", "all"),
    )
    assert result["card"]["found"] == num_test
    assert np.isfinite([result["scores"][name] for name in ("fid", "kid", "clip_i")]).all()
